"""How long a rank waits for another."""

import argparse
from datetime import timedelta

from sat_ext.sat import peers
from sat_ext.sat.settings import settings_of


def timeout(args: argparse.Namespace) -> bool:
    """Symptom: SAT starts its process groups with NCCL's limit of 10 minutes, and a first rank that works alone
    for longer, as where CogVideo samples 1.5 in an evaluation, ends the run.

    `args.timeout_minutes` is the limit of the groups that there are, and of those that are made later.
    """
    peers.set_limit(timedelta(minutes=settings_of(args).timeout_minutes))
    peers.begin()
    return True
