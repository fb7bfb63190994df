"""Event files: framing, checksums and messages, read back by a plain decoder."""

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.runtime.events import EventWriter, crc32c


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc32c_of_the_standards_examples(data, checksum):
    assert crc32c(data) == checksum


def unmasked(stored):
    rotated = (stored - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def records(path):
    """The payloads of a TFRecord file, every checksum verified."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size, head = struct.unpack_from("<QI", data, at)
        payload = data[at + 12 : at + 12 + size]
        assert unmasked(head) == crc32c(data[at : at + 8])
        assert unmasked(*struct.unpack_from("<I", data, at + 12 + size)) == crc32c(payload)
        found.append(payload)
        at += 16 + size
    return found


def decode(message):
    """[(field number, value)]: integers for varints, floats for fixed sizes, bytes for the rest."""
    at, found = 0, []

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value, shift = value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            found.append((number, varint()))
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        chunk, at = message[at : at + size], at + size
        found.append((number, chunk if wire == 2 else struct.unpack("<d" if wire == 1 else "<f", chunk)[0]))
    return found


def written(directory):
    (path,) = directory.glob("events.out.tfevents.*")
    return [dict(decode(record)) for record in records(path)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**62), st.dictionaries(st.text(max_size=20), st.floats(width=32, allow_nan=False), max_size=5))
def test_scalars_come_back(tmp_path_factory, step, values):
    directory = tmp_path_factory.mktemp("events")
    writer = EventWriter(directory)
    writer.write(step, values)
    writer.close()
    version, event = written(directory)
    assert version[3] == b"brain.Event:2"
    assert event[2] == step and abs(event[1] - time.time()) < 60
    scalars = [dict(decode(value)) for _, value in decode(event[5])]
    assert [(scalar[1].decode(), scalar[2]) for scalar in scalars] == list(values.items())


def test_a_resumed_run_starts_a_session_so_that_later_points_are_dropped(tmp_path):
    EventWriter(tmp_path, first_step=6).close()
    _, start = written(tmp_path)
    assert start[2] == 6 and decode(start[7]) == [(1, 1)]
