"""The wire format: what goes in comes out, openpi reads it, and what is malformed raises ProtocolError, only."""

import struct
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from poco_vla.serving.codec import MessageLimits, ProtocolError, pack, unpack

DTYPES = ["bool", "int8", "uint8", "<i2", ">i4", "<u8", ">f2", "<f4", ">f8"]
ARRAYS = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary(), ARRAYS)
)
VALUES = st.recursive(
    LEAVES, lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(st.text(), v, max_size=4)), max_leaves=12
)


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype.newbyteorder(a.dtype.byteorder) and _equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _equal(a, b):
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


@settings(deadline=None, max_examples=200)
@given(VALUES)
def test_what_goes_in_comes_out(value):
    assert same(value, unpack(pack(value)))


@given(ARRAYS)
def test_an_array_comes_out_as_a_writable_copy_in_native_order(array):
    data = pack(array)
    out = unpack(data)
    assert out.flags.writeable
    assert out.flags.c_contiguous
    assert out.dtype.isnative
    out[...] = 1
    assert data == pack(array)


def test_views_are_sent_as_what_they_show():
    array = np.arange(24).reshape(4, 6)[::2, ::-3]
    np.testing.assert_array_equal(unpack(pack(array)), array)


@pytest.mark.parametrize("scalar", [np.float32(0.1), np.uint8(255), np.int64(-5), np.bool_(True), np.float16("nan")])
def test_a_numpy_scalar_keeps_its_type(scalar):
    out = unpack(pack(scalar))
    assert type(out) is type(scalar)
    np.testing.assert_array_equal(out, scalar)


def test_openpi_reads_and_writes_the_same_bytes():
    openpi = pytest.importorskip("openpi_client.msgpack_numpy")
    value = {
        "observation.state": np.arange(6, dtype=np.float32),
        "observation.images.top": np.zeros((2, 3, 3), np.uint8),
        "reward": np.float32(0.5),
        "prompt": "pick",
        "nested": [{"x": np.array(3)}, None, True],
    }
    assert pack(value) == openpi.packb(value)
    assert same(value["nested"][0], openpi.unpackb(pack(value))["nested"][0])


REFUSED = {
    "object": np.array([{}], dtype=object),
    "void": np.zeros(2, [("a", "f4")]),
    "complex": np.zeros(2, complex),
    "text": np.array(["a"]),
    "time": np.array(["2020"], "M8[s]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_arrays_of_what_is_no_number_are_not_sent(kind):
    with pytest.raises(ProtocolError, match="dtype"):
        pack({"x": REFUSED[kind]})


def kind_of(value):
    return type(value).__name__


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**64, "\ud800", 1j, b"".join], ids=kind_of)
def test_what_cannot_be_sent_is_a_protocol_error(value):
    with pytest.raises(ProtocolError, match="sent"):
        pack(value)


def test_what_contains_itself_cannot_be_sent():
    value = []
    value.append(value)
    with pytest.raises(ProtocolError, match="cannot be sent"):
        pack(value)


def array(data=b"\0" * 8, dtype="<f4", shape=(2,), **more):
    fields = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(shape)}
    return msgpack.packb(fields | {key.encode(): value for key, value in more.items()})


def test_the_helper_below_writes_a_valid_array():
    np.testing.assert_array_equal(unpack(array()), np.zeros(2, np.float32))


@pytest.mark.parametrize(
    "data",
    [
        *(array(dtype=d) for d in ("O", "|O", "|V4", "<c8", "f4,f4", "(2,)f4", "<f16", "<M8[s]", "<U1", "", "f4\0", 7)),
        *(array(shape=s) for s in ([3], [-2], [2.0], [True, 2], ["2"], [0, 2**62], [1] * 7 + [2, 1])),
        array(data=b"", shape=[0, 2**26, 2**26, 2**26]),
        array(data="0" * 8),
        array(data=[0.0, 0.0]),
        array(extra=1),
        msgpack.packb({b"__ndarray__": True}),
        msgpack.packb({b"__ndarray__": False, b"data": b"", b"dtype": "<f4", b"shape": [0]}),
        *(
            msgpack.packb({b"__npgeneric__": True, b"data": value, b"dtype": dtype})
            for value, dtype in (
                (300, "|u1"),
                (float("nan"), "<i4"),
                ("1", "<f4"),
                (b"1", "|O"),
                (1, "<c8"),
                ([], "<f4"),
            )
        ),
        msgpack.packb({1: 2}),
        msgpack.packb({None: 2}),
        msgpack.packb(msgpack.Timestamp(1)),
        msgpack.packb(msgpack.ExtType(5, b"pickle")),
        b"",
        b"\xc1",
        b"\xa1\xff",  # no UTF-8
        b"\xa5ab",  # ends early
        b"\x01\x02",  # goes on after its end
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xffx",
        b"\xc6\xff",
    ],
)
def test_malformed_messages_raise_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        unpack(data)


def test_a_byte_that_is_no_boolean_becomes_true():
    assert unpack(array(data=b"\0\1\2", dtype="|b1", shape=[3])).tobytes() == b"\0\1\1"


def test_a_message_is_bounded_in_bytes_values_and_depth():
    unpack(pack([1] * 99), MessageLimits(max_bytes=102, max_elements=100, max_depth=1))
    with pytest.raises(ProtocolError, match="102 bytes; at most 101"):
        unpack(pack([1] * 99), MessageLimits(max_bytes=101))
    with pytest.raises(ProtocolError, match="at most 99"):
        unpack(pack([1] * 99), MessageLimits(max_elements=99))
    with pytest.raises(ProtocolError, match="inside each other"):
        unpack(pack({"a": [1]}), MessageLimits(max_depth=1))
    with pytest.raises(ProtocolError, match="inside each other"):
        unpack(b"\x91" * 100_000 + b"\x01", MessageLimits(max_elements=10**6))


def test_lists_that_only_declare_their_length_cost_nothing():
    """Each of 1,000 nested lists declares as many values as bytes follow: 800 MB of pointers, if one believed them."""
    size = 100_000
    bomb = b"".join(b"\xdd" + struct.pack(">I", size) for _ in range(1000)) + b"\x00" * size
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="values or more"):
        unpack(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * size


OBSERVATION = pack(
    {"observation.state": np.arange(4.0), "i": np.zeros((2, 2, 3), np.uint8), "task": "go", "x": [1, {}]}
)


def survives(data):
    try:
        pack(unpack(data, MessageLimits(max_bytes=10_000)))
    except ProtocolError:
        return False
    return True


@settings(deadline=None, max_examples=2000)
@given(st.binary(max_size=200))
@example(b"\xc7\x00\x00")
def test_random_bytes_are_a_value_or_a_protocol_error(data):
    survives(data)


@settings(deadline=None, max_examples=2000)
@given(
    st.lists(st.tuples(st.integers(0, len(OBSERVATION) - 1), st.integers(0, 255)), max_size=5),
    st.integers(0, len(OBSERVATION)),
    st.integers(0, len(OBSERVATION)),
)
def test_damaged_messages_are_a_value_or_a_protocol_error(changes, start, stop):
    """Bytes changed, and what lies between two places cut out."""
    data = bytearray(OBSERVATION)
    for at, byte in changes:
        data[at] = byte
    survives(bytes(data[:start] + data[max(start, stop) :]))


def test_the_message_that_is_damaged_above_is_whole_before():
    assert survives(OBSERVATION)
