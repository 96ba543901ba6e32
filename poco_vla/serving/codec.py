"""What goes over the wire: MessagePack with numpy arrays the way openpi's clients and servers write them.

An array is ``{b"__ndarray__": True, b"data": bytes, b"dtype": str, b"shape": [int, ...]}``, a numpy scalar
``{b"__npgeneric__": True, b"data": number, b"dtype": str}``. No pickle, no extension types: a message can hold numbers,
texts, bytes, lists, maps and arrays of numbers, and nothing in it is executed.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from poco_vla.errors import PocoError

PROTOCOL_VERSION = 1
"""Of metadata, requests and replies. A client says its own in `VERSION_HEADER`; openpi's clients say none."""
VERSION_HEADER = "Poco-Vla-Protocol"
MAX_BYTES = 64 * 1024**2
"""Default limit of one message: some twenty uncompressed pictures of 1280 x 720."""


class ProtocolError(PocoError):
    """A message, or the other end of a connection, that does not keep the protocol."""


@dataclass(frozen=True)
class MessageLimits:
    """What a message may cost its receiver, checked before anything is allocated for it.

    Attributes:
        max_bytes: length of the whole message.
        max_elements: values in it, maps' keys counted, at all depths. An array is a handful, however large.
        max_depth: maps and lists inside each other.
        max_text: bytes of a text; bytes of arrays are none.
    """

    max_bytes: int = MAX_BYTES
    max_elements: int = 10_000
    max_depth: int = 16
    max_text: int = 64 * 1024


def pack(value: Any) -> bytes:
    """Return the message that `unpack` and openpi read.

    Raises:
        ProtocolError: it holds what cannot be sent; the message names the type.
    """
    try:
        packed = msgpack.packb(value, default=_to_wire)
    except PocoError:
        raise
    except (ValueError, OverflowError, TypeError) as error:  # too deep, an integer of over 64 bits, lone surrogates
        raise ProtocolError(f"cannot be sent: {error}") from error
    assert packed is not None, "msgpack's own signature"
    return packed


def unpack(data: bytes, limits: MessageLimits | None = None) -> Any:
    """Return the value of a message from an untrusted sender. Arrays are writable copies in the machine's byte order.

    Raises:
        ProtocolError: a malformed message or one beyond `limits`; no other error leaves this function.
    """
    _check_structure(data, limits or MessageLimits())
    try:
        return msgpack.unpackb(data, object_hook=_from_wire)
    except PocoError:
        raise
    except (ValueError, TypeError) as error:  # invalid UTF-8, a map's key that is neither text nor bytes
        raise ProtocolError(f"malformed message: {error}") from error


# -- structure --------------------------------------------------------------------------------------------------------

_PLAIN = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8} | {
    base + power: 1 << power for base in (0xCC, 0xD0) for power in range(4)
}
"""First byte of nil, the booleans, floats and integers -> bytes that follow."""
_SIZED = {code + power: (1 << power, 1, 0) for code in (0xC4, 0xD9) for power in range(3)} | {
    code + power: (2 << power, 0, inside) for code, inside in ((0xDC, 1), (0xDE, 2)) for power in range(2)
}
"""First byte of bytes, texts, lists and maps -> bytes of the size that follows; bytes and values per unit of it."""
_TEXTS = (0xD9, 0xDA, 0xDB)
"""First byte of texts that are not short."""


def _check_structure(data: bytes, limits: MessageLimits) -> None:
    """Check the headers before unpacking. MessagePack's own limits are per list: nested lists that each declare a
    million values, with none of them present, would take gigabytes."""
    if len(data) > limits.max_bytes:
        raise ProtocolError(f"a message of {len(data)} bytes; at most {limits.max_bytes} are taken")
    at, declared, open_lists = 0, 1, [1]
    while open_lists:
        if not open_lists[-1]:
            open_lists.pop()
            continue
        open_lists[-1] -= 1
        at, inside = _skip_header(data, at, limits.max_text)
        declared += inside
        if at + inside > len(data):
            raise ProtocolError(f"malformed message: it ends after {len(data)} bytes, in the middle of a value")
        if declared > limits.max_elements:
            raise ProtocolError(f"a message of {declared} values or more; at most {limits.max_elements} are taken")
        if inside:
            open_lists.append(inside)
        if len(open_lists) > limits.max_depth + 1:
            raise ProtocolError(f"a message of more than {limits.max_depth} lists and maps inside each other")
    if at != len(data):
        raise ProtocolError(f"malformed message: {len(data) - at} bytes after its end")


def _skip_header(data: bytes, at: int, max_text: int) -> tuple[int, int]:
    """Return the offset of the next value, and the number of values inside this one."""
    if at >= len(data):
        raise ProtocolError("malformed message: it is empty")
    code, at = data[at], at + 1
    if code <= 0x7F or code >= 0xE0:  # small integers
        return at, 0
    if code <= 0x9F:  # short maps, short lists
        return at, (code & 0x0F) * (2 if code <= 0x8F else 1)
    if code <= 0xBF:  # short texts
        return at + (code & 0x1F), 0
    if code in _PLAIN:
        return at + _PLAIN[code], 0
    if code not in _SIZED:
        raise ProtocolError(f"malformed message: values of MessagePack type 0x{code:02x} are not taken")
    width, bytes_each, values_each = _SIZED[code]
    size = int.from_bytes(data[at : at + width])
    if code in _TEXTS and size > max_text:
        raise ProtocolError(f"a text of {size} bytes; at most {max_text} are taken")
    return at + width + size * bytes_each, size * values_each


# -- arrays -----------------------------------------------------------------------------------------------------------

_DTYPE = re.compile(r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]")
_MAX_DIMENSIONS = 8


def _to_wire(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise ProtocolError(
            f"a {type(value).__name__} cannot be sent: numbers, texts, bytes, lists, maps and arrays can"
        )
    dtype = _checked_dtype(value.dtype.str)
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": dtype.str}


def _from_wire(fields: dict[Any, Any]) -> Any:
    if b"__ndarray__" in fields:
        return _array(*_fields(fields, b"__ndarray__", b"data", b"dtype", b"shape"))
    if b"__npgeneric__" in fields:
        return _scalar(*_fields(fields, b"__npgeneric__", b"data", b"dtype"))
    return fields


def _fields(fields: dict[Any, Any], *names: bytes) -> list[Any]:
    """Return the content of an array's map, without its marker."""
    if fields.keys() != set(names) or fields[names[0]] is not True:
        raise ProtocolError(f"malformed array: expected exactly {[n.decode() for n in names]}")
    return [fields[name] for name in names[1:]]


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    kind = _checked_dtype(dtype)
    if not isinstance(data, bytes):
        raise ProtocolError(f"malformed array: its data are a {type(data).__name__}, expected bytes")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ProtocolError(f"malformed array: its shape is not a list of at most {_MAX_DIMENSIONS} sizes")
    if not all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape):
        raise ProtocolError(f"malformed array: its shape is {str(shape)[:100]}, expected sizes")
    if math.prod(shape) * kind.itemsize != len(data):
        raise ProtocolError(f"malformed array: {len(data)} bytes of data do not make {kind.name} of shape {shape}")
    if 0 in shape:
        return _empty(shape, kind)
    # A byte other than 0 and 1 is no boolean: numpy's behaviour is then undefined.
    raw = np.frombuffer(data, np.uint8 if kind.kind == "b" else kind)
    return raw.astype(kind.newbyteorder("=")).reshape(shape)


def _empty(shape: list[int], kind: np.dtype) -> np.ndarray:
    if math.prod(max(size, 1) for size in shape) > MAX_BYTES:  # numpy refuses such a shape with errors of its own
        raise ProtocolError(f"malformed array: its shape is {shape}, and it holds nothing")
    return np.empty(shape, kind.newbyteorder("="))


def _scalar(data: Any, dtype: Any) -> np.generic:
    kind = _checked_dtype(dtype)
    if not isinstance(data, bool | int | float):
        raise ProtocolError(f"malformed number: its data are a {type(data).__name__}")
    try:
        with np.errstate(over="ignore"):
            return kind.type(data)
    except (ValueError, OverflowError) as error:  # NaN or 300 as a uint8
        raise ProtocolError(f"malformed number: {str(data)[:40]} is no {kind.name}") from error


def _checked_dtype(dtype: Any) -> np.dtype:
    """Return the dtype of a name that is matched first: numpy would build structures and subarrays from others."""
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise ProtocolError(
            f"arrays of dtype {str(dtype)[:40]!r} are not sent: booleans, integers and floats up to 8 bytes are"
        )
    return np.dtype(dtype)
