"""TensorBoard event files without TensorFlow: scalars only.

A file is a sequence of TFRecords (length, its checksum, payload, its checksum) whose payloads are `Event` messages of
tensorflow/core/util/event.proto, encoded here by hand: wall_time = 1, step = 2, file_version = 3, summary = 5 (of it
value = 1: tag = 1, simple_value = 2), session_log = 7 (status = 1).
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from latent_jax.runtime import files

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5
_SESSION_START = 1


class EventWriter:
    """Appends scalars to a new event file in `directory`.

    `first_step` > 0 makes TensorBoard drop what earlier files of the directory hold from that step on.
    """

    def __init__(self, directory: Path, first_step: int = 0):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.name = str(Path(directory) / name)
        self._file = open(self.name, "ab")  # noqa: SIM115 (held open for the run)
        self._write(_field(3, _BYTES, b"brain.Event:2"))
        if first_step:
            status = _field(1, _VARINT, _SESSION_START)
            self._write(_field(2, _VARINT, first_step) + _field(7, _BYTES, status))

    def write(self, step: int, values: Mapping) -> None:
        """Writes the scalars of one step as one event."""
        summary = b"".join(
            _field(1, _BYTES, _field(1, _BYTES, tag.encode()) + _field(2, _FLOAT, float(value)))
            for tag, value in values.items()
        )
        self._write(_field(2, _VARINT, step) + _field(5, _BYTES, summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, fields: bytes) -> None:
        payload = _field(1, _DOUBLE, time.time()) + fields
        length = struct.pack("<Q", len(payload))
        with files.naming(self.name):
            self._file.write(length + _checksum(length) + payload + _checksum(payload))
            self._file.flush()


def _field(number: int, wire: int, value: int | float | bytes) -> bytes:
    """One protobuf field: key, then a varint, eight bytes, four bytes, or a length with that many bytes."""
    key = _varint(number << 3 | wire)
    if isinstance(value, bytes):
        return key + _varint(len(value)) + value
    if isinstance(value, int):
        return key + _varint(value)
    return key + struct.pack("<d" if wire == _DOUBLE else "<f", value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
    """TFRecord's masked checksum: rotated and shifted, since a checksum of data that holds checksums would be weak."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
