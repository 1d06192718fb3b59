"""What the pages of a Parquet file unpack to: Arrow makes room for that, whatever the footer says."""

from pathlib import Path
from typing import Any

__all__ = ["unpacked"]

#: Of a page's header, with the statistics of numbers in it; and how deep its structs are.
_HEADER_BYTES, _DEEPEST = 2**12, 4
#: Types of Thrift's compact protocol; lists and maps are in no header.
_FLAGS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12
#: Fields of a header: its sizes, and the structs whose first field is the number of values.
_UNPACKED, _PACKED, _COUNTS = 2, 3, (5, 7, 8)


def unpacked(path: Path, chunk: Any) -> tuple[int, int]:
    """How many values a column chunk has, and how many bytes its pages are, by their own headers.

    Args:
        path: of the file.
        chunk: pyarrow's ``ColumnChunkMetaData``.

    Raises:
        Exception: whatever comes of a header that is none.
    """
    # As Arrow has it, which reads no page beyond the end.
    position: int = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    end = position + chunk.total_compressed_size
    values = size = 0
    with path.open("rb") as file:
        while position < end:
            file.seek(position)
            header = _Header(file.read(_HEADER_BYTES))
            fields = header.struct()
            counts = [fields[key].get(1, -1) for key in _COUNTS if key in fields]
            sizes = [fields.get(key, -1) for key in (_UNPACKED, _PACKED)]
            if min(*sizes, *counts) < 0:
                raise ValueError(f"the page at byte {position} has a damaged header")
            values, size = values + sum(counts), size + sizes[0]
            position += header.position + sizes[1]
    return values, size


class _Header:
    """Bytes that begin with a struct of Thrift's; ``IndexError`` if they end before it does."""

    def __init__(self, content: bytes) -> None:
        self._content, self.position = content, 0

    def struct(self, depth: int = 1) -> dict[int, Any]:
        """Its integers and structs, by the numbers of their fields."""
        if depth > _DEEPEST:
            raise ValueError(f"a page's header is nested more than {_DEEPEST} deep")
        fields: dict[int, Any] = {}
        number = 0
        while (first := self._byte()) != 0:
            number = number + (first >> 4) if first >> 4 else self._integer()
            kind = first & 15
            if kind in _INTEGERS:
                fields[number] = self._integer()
            elif kind == _STRUCT:
                fields[number] = self.struct(depth + 1)
            elif kind in (_BYTE, _DOUBLE, _BINARY):
                size = {_BYTE: 1, _DOUBLE: 8}.get(kind) or self._varint()
                self.position += size
            elif kind not in _FLAGS:
                raise ValueError(f"a page's header has a field of type {kind}")
        return fields

    def _byte(self) -> int:
        self.position += 1
        return self._content[self.position - 1]

    def _varint(self) -> int:
        number = shift = 0
        while (byte := self._byte()) > 127:
            number, shift = number | (byte & 127) << shift, shift + 7
        return number | byte << shift

    def _integer(self) -> int:
        number = self._varint()
        return number >> 1 ^ -(number & 1)
