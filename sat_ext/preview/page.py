"""The report as one HTML file that needs nothing else: no network, no script."""

import jinja2
import markupsafe

from sat_ext.preview.report import Report


def render(report: Report) -> str:
    """The page. All text is escaped: captions and file names may hold anything."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sat_ext.preview", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, count=count, duration=duration, breakable=breakable)
    return environment.get_template("page.html.j2").render(report=report)


def percent(share: float) -> str:
    r"""A share of 1 in percent, never 0 for what is there and never 100 for what is not all.

    >>> percent(0.4), percent(0.004), percent(0.0004), percent(0.9996), percent(0.0)
    ('40\xa0%', '0.4\xa0%', 'under 0.1\xa0%', 'over 99.9\xa0%', '0\xa0%')
    """
    if 0 < share < 0.001:
        return "under 0.1\u00a0%"
    if 0.999 < share < 1 - 1e-9:
        return "over 99.9\u00a0%"
    digits = 1 if abs(100 * share - round(100 * share)) >= 0.05 and (share < 0.1 or share > 0.9) else 0
    return f"{100 * share:.{digits}f}\u00a0%"


def count(number: float) -> str:
    """A number with its thousands apart; below 10 with a decimal where it is not whole.

    >>> count(1234567), count(2.46), count(3.0)
    ('1,234,567', '2.5', '3')
    """
    if number < 10 and abs(number - round(number)) >= 0.05:
        return f"{number:.1f}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Hours, minutes, seconds; the two largest of them.

    >>> duration(7.25), duration(95), duration(7384)
    ('7.2 s', '1 min 35 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600:,} h {int(seconds) % 3600 // 60} min"


def breakable(path: str) -> markupsafe.Markup:
    """A path that may break behind its slashes.

    >>> breakable("a/<b>.mp4")
    Markup('a/<wbr>&lt;b&gt;.mp4')
    """
    return markupsafe.Markup("/<wbr>").join(path.split("/"))
