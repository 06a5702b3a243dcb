"""What becomes of a source's captions before the model reads them: a prefix, a trigger word, tags in other orders.

The options are those that trainers of styles share: `caption_prefix`, `shuffle_caption` and `keep_tokens` of
kohya-ss/sd-scripts (and `shuffle_tags` of diffusion-pipe), `trigger_word` and "[trigger]" of ostris/ai-toolkit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sat_ext.errors import ConfigError

PLACEHOLDER = "[trigger]"
MOST_ORDERS = 100  # of one caption: each is a caption of its own in the index, and in a cache


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """`caption` of a source, or of `data.params` for all sources.

    `prefix` is put in front of every caption. `trigger` is the word that calls up what is trained: it replaces
    every "[trigger]" in a caption, and leads a caption that does not have it. With `shuffle_tags: N` each visit
    draws one of N random orders of the caption's comma-separated tags; the first `keep_tags` stay where they are.
    Empty captions stay empty.
    """

    prefix: str = ""
    trigger: str = ""
    shuffle_tags: int = 0
    keep_tags: int = 0

    def __post_init__(self) -> None:
        for name, most in (("shuffle_tags", MOST_ORDERS), ("keep_tags", None)):
            value = getattr(self, name)
            if value < 0 or (most and value > most):
                raise ConfigError(f"caption.{name}: {value}; use 0 or more{f', at most {most}' if most else ''}.")
        if self.keep_tags and not self.shuffle_tags:
            raise ConfigError(f"caption.keep_tags: {self.keep_tags}, but no tags are shuffled; set shuffle_tags.")

    def of(self, caption: str, seed: Sequence[int] = ()) -> list[str]:
        """The captions that take the place of `caption`.

        >>> CaptionConfig(trigger="ohwx", prefix="Anime, ").of("a cat of [trigger], sleeping")
        ['Anime, a cat of ohwx, sleeping']
        >>> CaptionConfig(trigger="ohwx").of("a cat"), CaptionConfig(trigger="ohwx").of("")
        (['ohwx, a cat'], [''])
        >>> CaptionConfig(shuffle_tags=2, keep_tags=1).of("cat, red, big, old")
        ['cat, old, red, big', 'cat, old, big, red']
        """
        if not caption.strip():
            return [caption]
        caption = caption.replace(PLACEHOLDER, self.trigger) if self.trigger else caption
        if self.trigger and self.trigger not in caption:
            caption = f"{self.trigger}, {caption}"
        orders = [caption]
        if self.shuffle_tags:
            tags = [tag.strip() for tag in caption.split(",")]
            kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
            rng = np.random.default_rng(seed)
            orders = [", ".join([*kept, *rng.permutation(others)]) for _ in range(self.shuffle_tags)]
        return [self.prefix + order for order in orders]


def with_captions(batch: pa.RecordBatch, rule: CaptionConfig) -> pa.RecordBatch:
    """A batch of an index's rows with its captions as `rule` makes them; their weights stay what they were."""
    captions, weights = [], []
    columns = (batch.column(name).to_pylist() for name in ("key", "captions", "caption_weights"))
    for key, own, given in zip(*columns):
        # seeded by the key, so that a cache of embeddings stays valid when files are added
        found = [rule.of(caption, list(f"{key}{i}".encode())) for i, caption in enumerate(own)]
        captions.append([caption for orders in found for caption in orders])
        weights.append([w / len(orders) for w, orders in zip(given, found) for _ in orders])
    for name, values in (("captions", captions), ("caption_weights", weights)):
        place = batch.schema.get_field_index(name)
        field = batch.schema.field(place)
        batch = batch.set_column(place, field, pa.array(values, field.type))
    return batch
