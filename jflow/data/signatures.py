"""Signatures by which records are found that say the same: of pictures a perceptual hash, of texts a MinHash.

pHash of Zauner (2010): the signs, about their median, of the 8 x 8 lowest frequencies of the gray picture at 32 x 32.
Beside it lies the picture at 4 x 4 in color, since pictures of one color have one hash. MinHash of Broder (1997): the
least of 64 hashes over runs of five words; the share of equal ones estimates the Jaccard similarity of the two sets of
runs, with a standard error of at most 0.0625. Not in the paper: all of it.
"""

import hashlib
import re
import zlib

import numpy as np
from PIL import Image

from jflow.data import images
from jflow.data.records import Record

HASHES = 64  # of a text
RUN = 5  # words
SIDE, LOW, THUMB = 32, 8, 4  # pixels, frequencies, pixels
DTYPE = np.dtype(
  [
    ("content", "<u8"),  # of all: images and texts
    ("pictures", "<u8"),  # of the images alone; 0: none
    ("texts", "<u8"),  # of the texts alone
    ("count", "<i4"),  # images
    ("hash", "<u8"),  # of the first image
    ("thumb", "u1", (3 * THUMB**2,)),  # of the first image
    ("words", "<i4"),  # in all texts
    ("text", "<u4", (HASHES,)),
  ]
)
_PRIME = np.uint64(2**31 - 1)
_FACTORS = np.random.default_rng(0).integers(1, 2**31 - 1, (2, HASHES), np.uint64)
# Words, and single characters of scripts that do not part them.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def signature(record: Record) -> np.ndarray:
  """The signature of a record, DTYPE[]; its images are encoded.

  Raises:
    RecordError: an image cannot be decoded.
  """
  out = np.zeros((), DTYPE)
  texts = [record.text, *(turn.text for turn in record.turns)]
  digests = [hashlib.sha256(image).digest() for image in record.images]
  said = "\0".join(texts).encode("utf-8")
  out["content"], out["texts"] = _number(b"".join(digests) + said), _number(said)
  out["count"] = len(digests)
  if digests:
    out["pictures"] = _number(b"".join(digests)) or 1
    picture = Image.fromarray(images.decode(record.images[0]))
    out["hash"] = perceptual_hash(picture)
    out["thumb"] = np.asarray(picture.resize((THUMB, THUMB), Image.Resampling.BOX)).ravel()
  words = _WORDS.findall(" ".join(texts).casefold())
  out["words"] = len(words)
  out["text"] = minhash(words)
  return out


def perceptual_hash(picture: Image.Image) -> np.uint64:
  """pHash of a picture: 64 bits."""
  import scipy.fft

  gray = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
  low = scipy.fft.dctn(gray)[:LOW, :LOW]
  return np.packbits(low > np.median(low)).view(">u8")[0].astype(np.uint64)


def minhash(words: list[str]) -> np.ndarray:
  """MinHash of the runs of RUN words, u32[HASHES]; of fewer words, of all of them as one run."""
  runs = {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
  keys = np.array([zlib.crc32(run.encode("utf-8", "replace")) for run in runs], np.uint64) % _PRIME
  least = np.full(HASHES, 2**32 - 1, np.uint64)
  for start in range(0, len(keys), 4096):
    hashed = (keys[start : start + 4096, None] * _FACTORS[0] + _FACTORS[1]) % _PRIME
    least = np.minimum(least, hashed.min(axis=0))
  return least.astype(np.uint32)


def _number(data: bytes) -> int:
  return int.from_bytes(hashlib.sha256(data).digest()[:8])
