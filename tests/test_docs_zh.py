"""The Chinese pages say what the English ones say: the same code, figures, tables and links in every section."""

from __future__ import annotations

import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CHINESE = [page for page in PAGES if page.name.endswith(".zh.md") or page.parent == ROOT / "docs" / "zh"]

HAN = "[\u4e00-\u9fff]"
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A figure, and what it counts where both languages put that right after it; or the figure of a name (MP4s).
NUMBER = re.compile(
    r"([A-Za-z]?)(\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?)(?:[ -]?(million|[万亿]|[A-Za-z]+|%|秒|分钟?|位|字节|帧))?"
)
# What a comment in code quotes: code, a mapping, an option, a path, a name_with_parts.
QUOTED = re.compile(r"`[^`]+`|(?:\w+: )?\{[^}]*\}|--[\w-]+|[\w/]+(?:[_./=]\w+)+", re.ASCII)
SCALES = {"million": 10**6, "万": 10**4, "亿": 10**8}
UNITS = {
    word: words[0]
    for words in [
        *([unit] for unit in ["%", "x", "ms", "fps", "KB", "MB", "GB", "MiB", "GiB", "Mi", "MP", "dB", "TFLOP"]),
        ["s", "second", "seconds", "秒"],
        ["min", "minute", "minutes", "分", "分钟"],
        ["bit", "bits", "位"],
        ["byte", "bytes", "字节"],
        ["frame", "frames", "帧"],
    ]
    for word in words
}


def english_of(page: Path) -> Path:
    return ROOT / "README.md" if page.parent == ROOT else page.parents[1] / page.name


def chinese_of(page: Path) -> Path:
    """The page itself if it has no Chinese one."""
    twin = page.with_name(f"{page.stem}.zh.md") if page.parent == ROOT else page.parent / "zh" / page.name
    return twin if twin in CHINESE else page


@dataclass
class Section:
    level: int = 0
    text: list[str] = field(default_factory=list)
    blocks: list[list[str]] = field(default_factory=list)

    @property
    def prose(self) -> str:
        return "\n".join(self.text)

    @property
    def spans(self) -> list[str]:
        return [" ".join(span.split()) for span in SPAN.findall(self.prose)]

    @property
    def rows(self) -> list[list[str]]:
        return [line.strip("|").split("|") for line in self.text if line.startswith("|")]

    @property
    def links(self) -> list[str]:
        return LINK.findall(SPAN.sub("code", self.prose))


def sections(text: str) -> list[Section]:
    """By headings; each with its text and its blocks of code, fenced or indented by four."""
    found, fence, previous = [Section()], False, ""
    block: list[str] | None = None
    for line in text.splitlines():
        if line.startswith("```"):
            fence, block = not fence, None if fence else []
            if block is not None:
                found[-1].blocks.append(block)
                block.append(line)
        elif fence or (line.startswith("    ") and (block is not None or not previous)):
            if block is None:
                found[-1].blocks.append(block := [])
            block.append(line)
        else:
            block = None
            if heading := re.match("(#+) ", line):
                found.append(Section(level=len(heading[1])))
            found[-1].text.append(line)
        previous = line
    return found


def split_comment(line: str) -> tuple[str, str]:
    """A line of code, and its comment from a '#' outside quotes on."""
    found = re.match(r"""((?:"[^"]*"|'[^']*'|(?<=\S)\#|[^"'#])*)(\#.*)?""", line)
    if found is None or found.end() < len(line):  # an unpaired quote
        return line.rstrip(), ""
    return found[1].rstrip(), found[2] or ""


def split_column(english: str, chinese: str) -> tuple[str, str, str, str]:
    """Code and explanation of both lines: a comment, or a last column that starts at one place and is Chinese."""
    code, note = split_comment(english)
    ours, our_note = split_comment(chinese)
    first = re.search(HAN, ours)
    gap = ours.rfind("  ", 0, first.start()) + 2 if first else 0
    if gap > 2 and code[:gap] == ours[:gap] and code[gap : gap + 1].strip():
        return code[:gap], code[gap:] + note, ours[:gap], ours[gap:] + our_note
    return code, note, ours, our_note


def figures(text: str) -> Counter[tuple[Decimal, str]]:
    """How often each number occurs with its unit, outside inline code and the targets of links."""
    text = re.sub(r"\]\([^)\s]+\)", "]", SPAN.sub("", text))
    return Counter(
        (Decimal(number.replace(",", "")) * SCALES.get(unit, 1), "" if name else UNITS.get(unit, ""))
        for name, number, unit in NUMBER.findall(text)
    )


def alike(english: str, chinese: str) -> bool:
    """Whether the second is in Chinese, or has the words of the first."""
    return bool(re.search(HAN, chinese)) or re.findall(r"\w+", english) == re.findall(r"\w+", chinese)


def differences(english: str, chinese: str) -> Iterator[str]:
    ours, theirs = sections(chinese), sections(english)
    if [s.level for s in ours] != [s.level for s in theirs]:
        yield f"headings: levels {[s.level for s in ours]}, not {[s.level for s in theirs]}"
        return
    for a, b in zip(theirs, ours):
        where = b.text[0] if b.text else "the start"
        sizes = [[len(block) for block in s.blocks] for s in (b, a)]
        if sizes[0] != sizes[1]:
            yield f"{where}: blocks of code of {sizes[0]} lines, not {sizes[1]}"
        for block, our_block in zip(a.blocks, b.blocks):
            lines = ("\n".join(block), "\n".join(our_block))
            for line, our_line in zip(*(textwrap.dedent(text).split("\n") for text in lines)):
                code, note, our_code, our_note = split_column(line, our_line)
                said, our_said = ((bool(x), figures(x), Counter(QUOTED.findall(x))) for x in (note, our_note))
                if (code, said) != (our_code, our_said) or not alike(note, our_note):
                    yield f"{where}: the line of code '{our_line}', not '{line}'"
        if a.spans != b.spans:
            at = next((i for i, pair in enumerate(zip(a.spans, b.spans)) if pair[0] != pair[1]), None)
            here = (b.spans[at:], a.spans[at:]) if at is not None else (b.spans, a.spans)
            yield f"{where}: inline code {here[0][:5]}... ({len(b.spans)}), not {here[1][:5]}... ({len(a.spans)})"
        expected, found = figures(a.prose), figures(b.prose)
        if expected != found:
            show = [
                sorted(f"{n} {unit}".strip() for n, unit in x.elements())
                for x in (found - expected, expected - found)
            ]
            yield f"{where}: has the figures {show[0]}, lacks {show[1]}"
        if [len(row) for row in a.rows] != [len(row) for row in b.rows]:
            yield f"{where}: tables of {[len(row) for row in b.rows]} cells, not {[len(row) for row in a.rows]}"
        for cells, our_cells in zip(a.rows, b.rows):
            for cell, our_cell in zip(cells, our_cells):
                holds, ours_holds = ((figures(x), SPAN.findall(x)) for x in (cell, our_cell))
                if holds != ours_holds or not alike(cell, our_cell):
                    yield f"{where}: the cell '{our_cell.strip()}', not '{cell.strip()}'"
        items = [sum(line.startswith("- ") for line in s.text) for s in (b, a)]
        if items[0] != items[1]:
            yield f"{where}: {items[0]} items in lists, not {items[1]}"


def anchors(page: Path) -> list[str]:
    """GitHub's, of the headings of a page."""
    titles = [s.text[0].lstrip("# ").lower() for s in sections(page.read_text("utf-8")) if s.level]
    return [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]


def target(page: Path, link: str) -> tuple[str, int | None]:
    """The file that a relative link leads to, and the number of the heading there; raises if there is none."""
    if "://" in link:
        return link, None
    path, _, anchor = link.partition("#")
    file = Path(os.path.normpath(page.parent / path)) if path else page
    assert file.exists(), f"{page.relative_to(ROOT)} links to {link}, which does not exist"
    assert not anchor or anchor in anchors(file), (
        f"{page.relative_to(ROOT)} links to {link}, a heading that is not there"
    )
    return str(file), anchors(file).index(anchor) if anchor else None


def test_every_page_links_to_the_other_language() -> None:
    assert CHINESE
    for page in CHINESE:
        english = english_of(page)
        for of, to, name in ((page, english, "English"), (english, page, "中文")):
            line = of.read_text("utf-8").splitlines()[2]
            assert line == f"[{name}]({os.path.relpath(to, of.parent)})", of


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for section in sections(page.read_text("utf-8")):
        for link in section.links:
            target(page, link)


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_chinese_page_has_what_the_english_one_has(page: Path) -> None:
    found = list(differences(english_of(page).read_text("utf-8"), page.read_text("utf-8")))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_chinese_page_links_to_chinese_pages(page: Path) -> None:
    english = english_of(page)
    theirs, ours = (sections(p.read_text("utf-8")) for p in (english, page))
    for a, b in zip(theirs, ours):
        links = [(english, link) for link in a.links], [(page, link) for link in b.links]
        expected, found = (Counter(target(*link) for link in side) for side in links)
        there = Counter((str(chinese_of(Path(file))), heading) for file, heading in expected.elements())
        here = Counter((str(chinese_of(Path(file))), heading) for file, heading in found.elements())
        assert here == there, b.text[0]
        # the link to the English page, under the title, is the only one to a page that also exists in Chinese
        other = [file for file, _ in found.elements() if str(chinese_of(Path(file))) != file]
        assert other == ([str(english)] if b.level == 1 else []), b.text[0]


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: str(page.relative_to(ROOT)))
def test_chinese_text_is_set_as_chinese(page: Path) -> None:
    for section in sections(page.read_text("utf-8")):
        lines = [re.sub(r"\]\([^)\s]+\)", "]", SPAN.sub("`x`", line)) for line in section.text]
        for line, following in zip(lines, [*lines[1:], ""]):
            plain = re.sub(r"!?\[|[*\]]", "", line)
            assert not re.search(f"{HAN}[A-Za-z0-9`]|[A-Za-z0-9`%]{HAN}", plain), f"a space is missing in: {line}"
            assert not re.search(f"{HAN}[,;:?!()]|[,;:?!)]{HAN}", plain), f"punctuation is not Chinese in: {line}"
            for bold in re.finditer(r"\*\*(.+?)\*\*", line):
                text, around = bold[1], line[: bold.start()][-1:] + line[bold.end() :][:1]
                fine = re.fullmatch(r"\w(.*\w)?", text) or not re.search(r"\w", around)
                assert fine, f"GitHub shows the ** around '{text}' as they are"
            broken = line and following and line[0] not in "|-#" and following[0] not in "|-#"
            assert not broken, f"a line break shows as a space after: {line}"


ENGLISH = """# Title

Run `sat-ext plan` on 24 GB or 1,000 MB, `--json` for 20 million records in 3.5 s.

    sat-ext plan --gpu-memory 24GB    # with 2 GPUs
    sat-ext check my_data             # or with --full, for mix: {image: 0.3}
    latest                the newest, 3 MB

| a | b |
|---|---|
| `x` | 1 % |
| `y` | 2 % |
| LoRA | 3 |
"""
TWIN = """# 标题

`sat-ext plan` 用于 24 GB 或 1,000 MB，`--json` 在 3.5 秒内处理 2000 万条记录。

    sat-ext plan --gpu-memory 24GB    # 2 块 GPU
    sat-ext check my_data             # 用 --full，即 mix: {image: 0.3}
    latest                最新的，3 MB

| 甲 | 乙 |
|---|---|
| `x` | 1 % |
| `y` | 2 % |
| LoRA | 3 |
"""


def test_equal_pages_have_no_differences() -> None:
    assert list(differences(ENGLISH, TWIN)) == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("# 标题", "## 标题"),
        ("`sat-ext plan`", "`sat-ext plans`"),
        ("`--json`", "json"),
        ("用于 24 GB", "用于 24 MB"),
        ("用于 24 GB", "用于 2.4 GB"),
        ("1,000", "1,001"),
        ("3.5 秒", "3.5 分钟"),
        ("2000 万", "2000"),
        ("24GB ", "25GB "),
        ("# 2 块", "# 3 块"),
        ("# 2 块 GPU", ""),
        ("mix: {image: 0.3}", "max: {image: 0.3}"),
        ("# 用 --full", "# 用 --fall"),
        ("latest ", "newest "),
        ("3 MB", "4 MB"),
        ("    sat-ext plan --gpu-memory 24GB    # 2 块 GPU", "    这是 2 块 GPU"),
        ("    latest                最新的，3 MB\n", ""),
        ("| `y` | 2 % |\n", ""),
        ("| `x` | 1 % |\n| `y` | 2 % |", "| `x` | 2 % |\n| `y` | 1 % |"),
        ("| `x` | 1 % |\n| `y` | 2 % |", "| `y` | 1 % |\n| `x` | 2 % |"),
        ("| 1 % |", "| 1 |"),
        ("| LoRA |", "| LORA |"),
    ],
)
def test_a_change_of_one_page_is_found(old: str, new: str) -> None:
    changed = TWIN.replace(old, new, 1)
    assert changed != TWIN
    assert list(differences(ENGLISH, changed))
