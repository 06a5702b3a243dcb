"""Where in the range of timesteps each sample of an update lies: spread evenly, each source apart.

Independent draws leave gaps by chance: some updates see mostly high noise, others low. Of the n samples that an
update has of a source, over all ranks and steps, each takes a different one of n equal parts of the range, in
random order and at a random place in its part. A single sample still has every timestep with the same chance.
"""

from collections import Counter

import numpy as np

from sat_ext.data.permutation import key_of, mix, permute
from sat_ext.data.schedule import Schedule


def stratified_places(
    schedule: Schedule, step: int, rank: int, *, accumulation: int, origin: int = 0
) -> list[np.ndarray]:
    """For each part of `step` the places of the samples of `rank`, float64 from 0 to below 1.

    An update is `accumulation` steps, and one begins at step `origin`. The places follow from seed, step and rank.
    """
    update, number = divmod(step - origin, accumulation)
    samples = Counter[str]()  # of each source in the update, over all ranks
    first: dict[int, int] = {}  # for each cell of this step: of its source, how many come before it
    for other in range(accumulation):
        for part in schedule.step(step - number + other):
            source = schedule.cells[part.cell].source
            if other == number:
                first[part.cell] = samples[source]
            samples[source] += part.samples * schedule.world
    places = []
    for part in schedule.step(step):
        source = schedule.cells[part.cell].source
        own = first[part.cell] + rank * part.samples + np.arange(part.samples, dtype=np.int64)
        key = np.full(own.shape, key_of(schedule.seed, "timesteps", source, update))
        turn = int(key_of(schedule.seed, "turn", source, update))
        within = mix(key ^ mix(own.astype(np.uint64))) / 2**64
        # a permutation of few values is not uniform, so it is turned by a number that is
        turned = (permute(own, samples[source], key) + turn % samples[source]) % samples[source]
        places.append((turned + within) / samples[source])
    return places
