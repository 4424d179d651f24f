"""The flags of commands that read the shards of data sets in object stores through a cache."""

import argparse
from collections.abc import Iterable

from jflow import stores
from jflow.cli.arguments import number
from jflow.data.store.cache import USUAL, Cache


def add(p: argparse.ArgumentParser) -> None:
  """Adds --cache and --cache_gib."""
  p.add_argument(
    "--cache", metavar="DIR", default=USUAL, help="copies of shards of a store, on a local disk (default %(default)s)"
  )
  p.add_argument("--cache_gib", type=number(0), default=100.0, help="of all copies (default %(default)g)")


def opened(args: argparse.Namespace, directories: Iterable[str]) -> Cache | None:
  """The cache that the flags name; None where no data set is in a store. Raises UserError."""
  return Cache(args.cache, args.cache_gib * 2**30, "--cache") if any(map(stores.is_address, directories)) else None
