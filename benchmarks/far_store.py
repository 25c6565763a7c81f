"""A stand-in for an object store: objects in this process's memory behind fsspec, each call of which takes a while.

It does what s3fs does, no more: no rename, a thousand names a listing's call or a deletion's, as many transfers at a
time as it is asked for. It is for tests and benchmarks, which import `FarStore` and then give ``far://bucket/runs``.
"""

import asyncio
from bisect import bisect_left, insort
from collections import Counter, UserDict
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.asyn import AsyncFileSystem

PAGE = 1000


class Objects(UserDict[str, bytes]):
    """Objects by their names, which are kept in order: a listing costs what it finds, as a store's index does."""

    def __init__(self) -> None:
        self._names: list[str] = []
        super().__init__()

    def __setitem__(self, name: str, value: bytes) -> None:
        if name not in self:
            insort(self._names, name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self._names[bisect_left(self._names, name)]

    def under(self, top: str) -> list[str]:
        """The names in a directory, and `top` itself where it is an object."""
        first, last = bisect_left(self._names, f"{top}/"), bisect_left(self._names, f"{top}0")  # 0 comes after /
        return [*([top] if top in self else []), *self._names[first:last]]


class FarStore(AsyncFileSystem):
    """Objects by their names, ``bucket/runs/a/events.jsonl``. All that is here belongs to the class, as to a bucket.

    `calls` counts calls by their kind, `most` is how many there were at a time, `put_names` has names in the order that
    they came to be there, `latency` is in seconds.
    """

    protocol = "far"
    objects: ClassVar[Objects] = Objects()
    calls: ClassVar[Counter[str]] = Counter()
    latency: ClassVar[float] = 0.02
    put_names: ClassVar[list[str]] = []
    most: ClassVar[int] = 0
    _under_way: ClassVar[int] = 0

    @classmethod
    def clear(cls) -> None:
        """Forget all objects and counts."""
        cls.objects.clear()
        cls.calls.clear()
        cls.put_names.clear()
        cls.most = 0

    @classmethod
    async def _call(cls, kind: str) -> None:
        cls.calls[kind] += 1
        cls._under_way += 1
        cls.most = max(cls.most, cls._under_way)
        try:
            await asyncio.sleep(cls.latency)
        finally:
            cls._under_way -= 1

    def _described(self, name: str) -> dict[str, Any]:
        return {"name": name, "size": len(self.objects[name]), "type": "file"}

    async def _find(self, path: str, maxdepth: Any = None, withdirs: bool = False, **options: Any) -> Any:
        names = self.objects.under(_name(path).rstrip("/"))
        for _ in range(0, max(1, len(names)), PAGE):
            await self._call("list")
        return {name: self._described(name) for name in names} if options.get("detail") else names

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        await self._call("head")
        name = _name(path)
        if name in self.objects:
            return self._described(name)
        if self.objects.under(name):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    async def _cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        await self._call("get")
        try:
            return self.objects[_name(path)][start:end]
        except KeyError:
            raise FileNotFoundError(path) from None

    async def _get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        Path(lpath).write_bytes(await self._cat_file(rpath))

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        await self._call("put")
        name = _name(path)
        self.objects[name] = bytes(value)
        self.put_names.append(name)

    async def _put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **_: Any) -> None:
        await self._pipe_file(rpath, Path(lpath).read_bytes())

    async def _rm_file(self, path: str, **_: Any) -> Any:
        await self._call("delete")
        self.objects.pop(_name(path), None)  # as S3, which does not say that there was none

    async def _rm(
        self, path: Any, recursive: bool = False, batch_size: Any = None, maxdepth: Any = None, **_: Any
    ) -> Any:
        assert recursive and isinstance(path, str)
        names = await self._find(path)
        for start in range(0, len(names), PAGE):
            await self._call("delete")
            for name in names[start : start + PAGE]:
                self.objects.pop(name, None)


def _name(path: str) -> str:
    return str(FarStore._strip_protocol(path))


fsspec.register_implementation("far", FarStore, clobber=True)
