"""Reading every picture in full before it gets an id.

`pack` is where a broken picture is caught: DALI fills a JPEG that was cut off and says nothing at training.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from autodo_dist.data import pil
from autodo_dist.data.sources import Source, one_line
from autodo_dist.data.unfinished import read_note, write_note
from autodo_dist.errors import AutodoError

EXTENSIONS = ("jpg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pnm", "jp2")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")  # PIL's names
PIXELS = 89_478_485  # PIL's own limit; 268 MB as RGB
# (format, PIL's mode) that DALI 2.4 decodes to wrong colours, silently.
WRONG_COLOURS = {("TIFF", "LA"), ("TIFF", "PA"), ("TIFF", "LAB"), ("TIFF", "F")}
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF's tag, and its value


class Found(NamedTuple):
    """A picture that decodes: its file's stamp, and its pixels after EXIF orientation."""

    file_size: int
    file_time: int
    height: int
    width: int


def probe_chunk(note: Path, sources: Sequence[Source]) -> list[Found | str]:
    """Read pictures in full: what was found, or what is wrong, for each of them.

    What was found is noted, so that an unbroken picture is read again only if its file has changed since. OSError if
    the note cannot be written.
    """
    noted = read_note(note)
    shape_of, found = shape_reader(), {}
    answers: list[Found | str] = []
    for source in sources:
        try:
            stamp = source.stamp()
            *noted_stamp, height, width = noted.get(source.key, (-1, -1, 0, 0))
            if tuple(noted_stamp) != stamp:
                height, width = probe(source, shape_of)
            found[source.key] = [*stamp, height, width]
            answers.append(Found(*stamp, height, width))
        except OSError as error:
            answers.append(f"cannot be read ({error.strerror or error})")
        except AutodoError as error:
            answers.append(str(error))
    if found != noted:
        write_note(note, found)
    return answers


def shape_reader() -> Callable[[bytes], tuple[int, int]]:
    """What decodes a picture as training does and gives its (height, width): DALI where it is installed, else PIL."""
    try:
        from autodo_dist.data.decode import Decoder
    except ImportError:
        return lambda encoded: pil.decode(encoded).shape[:2]
    return Decoder().shape


def probe(source: Source, shape_of: Callable[[bytes], tuple[int, int]]) -> tuple[int, int]:
    """Decode a picture in full, twice, and return its (height, width) after EXIF orientation.

    PIL finds what is cut off, which DALI fills silently; `shape_of` is what training reads with. AutodoError says what
    is wrong with it, OSError why it cannot be read.
    """
    if source.extension not in EXTENSIONS:
        raise AutodoError(f"not a known picture extension ({', '.join(EXTENSIONS)})")
    raw = source.read()
    if not raw:
        raise AutodoError("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                _require_right_colours(image)
                image.load()
    except UnidentifiedImageError as error:
        raise AutodoError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise AutodoError(f"more than {PIXELS:,} pixels by its header; make it smaller") from error
    except AutodoError:
        raise
    except Exception as error:  # PIL's decoders answer broken bytes with many kinds: SyntaxError, struct.error, ...
        raise AutodoError(one_line(error)) from error
    return shape_of(raw)


def _require_right_colours(image: Image.Image) -> None:
    """AutodoError if DALI 2.4 decodes such a picture to wrong colours: it would do so silently."""
    kind = f"{image.format} of mode {image.mode}"
    if (image.format, image.mode) in WRONG_COLOURS:
        raise AutodoError(f"DALI decodes {kind} to wrong colours")
    tags = getattr(image, "tag_v2", {})
    if kind == "TIFF of mode I;16" and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise AutodoError("DALI decodes TIFF of 16 bits whose zero is white to wrong colours")
    tiles = getattr(image, "tile", [])
    if image.format == "PPM" and tiles and tiles[0].codec_name == "ppm" and tiles[0].args[1] not in (255, 65535):
        raise AutodoError(f"DALI decodes PPM of {tiles[0].args[1] + 1} steps to wrong colours")
