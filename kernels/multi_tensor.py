"""One launch for any number of tensors: a table on the device says which chunk of which tensor each program handles.

A list of T tensors is cut into C chunks of CHUNK elements, none of which spans two tensors. The table has a part that
is made once per list of shapes,

    facts  int64 [3, T]   of each tensor: numel, parameter index, global index of its first element
    chunks int32 [2, C]   of each chunk: its tensor, its number within the tensor

and the addresses of the tensors, int64 [lists, T], of which only the lists that moved since the last launch are sent
again. Offsets are 64-bit throughout.
"""

import torch
import triton
import triton.language as tl

from growkit import reference
from growkit.kernels.lists import WITHOUT_ADDRESS, describe

CHUNK = 4096

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CODES = {torch.uint8: tl.uint8, torch.int8: tl.int8}
ROW = reference.CODES_PER_SCALE


@triton.jit
def chunk_of(chunks, count, c):
    """Tensor that chunk c lies in, and the chunk's number within the tensor; both int64."""
    return tl.load(chunks + c).to(tl.int64), tl.load(chunks + count + c).to(tl.int64)


@triton.jit
def fact(facts, tensors, t, k: tl.constexpr):
    """Of tensor t: k = 0 numel, 1 parameter index, 2 global index of its first element."""
    return tl.load(facts + k * tensors + t)


@triton.jit
def address(addresses, tensors, t, k: tl.constexpr):
    """Address of tensor t of list k, as an integer."""
    return tl.load(addresses + k * tensors + t)


@triton.jit
def aligned(where, dtype: tl.constexpr):
    """Pointer to an address that is a multiple of 16, so that accesses can be 128 bits wide."""
    return tl.multiple_of(where.to(tl.pointer_type(dtype)), 16)


class Lists:
    """Equally long lists of tensors, equal in shape within each position, made ready for one launch.

    lists: {name: list of tensors}; of a first one that is a `TensorList` nothing is checked again as long as devices,
    dtypes, sizes and strides are those of the last call. written: names of those the kernel writes. parameter, offset:
    what the random bits of each tensor are keyed by, for a kernel that draws any. codes: {name of a list of 8-bit
    codes: name of the list of their scales, two for each ROW elements of a tensor}.
    arguments: what every kernel takes first, (addresses, facts, chunks, T, C). chunks: C. dtypes: of each list, as the
    kernel names them.

    Elementwise kernels walk tensors in memory order where all lists agree in a dense layout. Where they do not, or
    where random bits belong to the row-major index and the layout is another, contiguous copies take the tensors'
    place, and `launch` writes those of the lists in `written` back. Raises ValueError, which names the list, for
    unequal lengths or numbers of elements and for more than one device or dtype per list.
    """

    def __init__(self, op, lists, *, written=(), parameter=(), offset=(), codes=None):
        try:
            told = [getattr(tensors, "told", None) or describe(tensors) for tensors in lists.values()]
        except WITHOUT_ADDRESS:
            _check(op, lists, codes or {})  # names a tensor on another device
            raise
        addresses, facts = zip(*told, strict=True)
        made_of = op, CHUNK, (*lists,), facts, (*parameter,), (*offset,)
        first = next(iter(lists.values()))
        known = getattr(first, "known", {})
        plan = known.get("plan")
        if plan is None or plan.made_of != made_of:
            plan = _kept(_plans, made_of, lambda: _Plan(made_of, lists, _check(op, lists, codes or {})))
            known["plan"] = plan
        self.dtypes, table = plan.dtypes, plan.table
        self._copies, self._tensors = [], None
        if not plan.contiguous:
            self._tensors = self._dense(lists, written, numbered=bool(parameter))  # copies must live until the launch
            addresses = [describe(tensors)[0] for tensors in self._tensors]
        self.chunks = table.count
        self.arguments = table.addresses(addresses), table.facts, table.chunks, len(first), self.chunks

    def launch(self, kernel, *arguments, block, warps, programs=None):
        """Run the kernel over all chunks, in at most so many programs, and write copies back."""
        if self.chunks:
            with torch.cuda.device_of(self.arguments[0]):
                kernel[(min(self.chunks, programs or self.chunks),)](
                    *self.arguments, *arguments, CHUNK, block, num_warps=warps, enable_fp_fusion=False
                )
        for t, copy in self._copies:
            t.copy_(copy)

    def _dense(self, lists, written, numbered):
        result = [list(tensors) for tensors in lists.values()]
        for i, tensors in enumerate(zip(*result, strict=True)):
            if not numbered and len({t.stride() for t in tensors}) == 1 and _is_dense(tensors[0]):
                continue
            for name, t, own in zip(lists, tensors, result, strict=True):
                if not t.is_contiguous():
                    own[i] = t.contiguous()
                    if name in written:
                        self._copies.append((t, own[i]))
        return result


def _is_dense(t):
    """Whether the elements fill one stretch of memory without gap or overlap."""
    size = 1
    for stride, n in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != size:
            return False
        size *= n
    return True


# Plans and their tables, by what they are made from; beyond _KEPT the oldest goes. None holds a tensor of a caller.
_KEPT = 64
_plans: dict = {}
_tables: dict = {}
# What CUDA graphs read at every replay. Nothing tells when a graph is gone, so it stays.
_captured: list = []


def _check(op, lists, codes):
    """dtype of each list, as the kernels name it. Raises for what one launch cannot take."""
    first, dtypes = next(iter(lists.values())), []
    device = first[0].device
    for name, tensors in lists.items():
        if len(tensors) != len(first):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors, expected {len(first)}")
        dtype = tensors[0].dtype
        for i, (t, like) in enumerate(zip(tensors, first, strict=True)):
            if (t.dtype, t.device) != (dtype, device):
                raise ValueError(
                    f"{op}: {name}[{i}] is {t.dtype} on {t.device}, expected {dtype} on {device} as the first: one "
                    "call per dtype and device"
                )
            expected = 2 * -(-like.numel() // ROW) if name in codes.values() else like.numel()
            if t.numel() != expected:
                raise ValueError(f"{op}: {name}[{i}] has {t.numel()} elements, expected {expected}")
        allowed = CODES if name in codes else DTYPES
        if dtype not in allowed:
            raise TypeError(f"{op}: {name} is {dtype}, expected one of {', '.join(map(str, allowed))}")
        dtypes.append(allowed[dtype])
    return dtypes


class _Plan:
    """How lists go into one launch: what does not depend on where the tensors lie."""

    def __init__(self, made_of, lists, dtypes):
        self.made_of, self.dtypes = made_of, dtypes
        self.contiguous = all(t.is_contiguous() for tensors in lists.values() for t in tensors)
        first, (parameter, offset) = next(iter(lists.values())), made_of[-2:]
        facts = first[0].device, tuple(t.numel() for t in first), parameter, offset
        self.table = _kept(_tables, (CHUNK, *facts), lambda: _Table(*facts))


def _kept(cache, key, make):
    found = cache.get(key)
    if found is None:
        found = make()
        if len(cache) >= _KEPT:
            del cache[next(iter(cache))]
        cache[key] = found
    return found


_RUN_ONCE = "CUDA graph capture: run the same call once, outside of any capture, before each capture"


class _Table:
    def __init__(self, device, numel, parameter, offset):
        self._device, self._cuda = device, device.type == "cuda"
        if self._capturing():
            raise RuntimeError(_RUN_ONCE)
        zeros = (0,) * len(numel)
        counts = torch.tensor([-(-n // CHUNK) for n in numel])
        tensor = torch.arange(len(numel)).repeat_interleave(counts)
        number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
        self.facts = torch.tensor([numel, parameter or zeros, offset or zeros]).to(device)
        self.chunks = torch.stack((tensor, number)).to(device, torch.int32)
        self.count, self._length = len(tensor), len(numel)
        self._sent = {}  # (number of lists, stream) -> (addresses on the device, the lists that they were sent from)
        self._spare = {}  # number of lists -> pinned memory for the next capture, which must not allocate any

    def addresses(self, found):
        """`found`, the addresses of each list, as int64 [lists, T] on the device."""
        if self._capturing():
            return self._capture(found)
        # One copy per stream: a step on another stream must not overwrite what a kernel of this one still reads.
        key = len(found), torch.cuda.current_stream(self._device).cuda_stream if self._cuda else 0
        shape = len(found), self._length
        if self._cuda and len(found) not in self._spare:
            self._spare[len(found)] = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        if key not in self._sent:
            if self._cuda:  # a table that goes must not be overwritten while any stream reads it
                self.facts.record_stream(torch.cuda.current_stream(self._device))
                self.chunks.record_stream(torch.cuda.current_stream(self._device))
            self._sent[key] = torch.empty(shape, dtype=torch.int64, device=self._device), [None] * len(found)
        there, sent = self._sent[key]
        for k, addresses in enumerate(found):
            if addresses != sent[k]:
                here = _packed(addresses)
                # torch's allocator of pinned memory uses this again only once the copy is done.
                there[k].copy_(here.pin_memory() if self._cuda else here, non_blocking=True)
                sent[k] = addresses
        return there

    def _capturing(self):
        return self._cuda and torch.cuda.is_current_stream_capturing()

    def _capture(self, found):
        """Addresses for a graph, which sends them anew at each replay: from memory, to memory, that are its own."""
        if len(found) not in self._spare:
            raise RuntimeError(_RUN_ONCE)
        here = self._spare.pop(len(found))
        for row, addresses in zip(here, found, strict=True):
            row.copy_(_packed(addresses))
        there = torch.empty(here.shape, dtype=torch.int64, device=self.facts.device)
        _captured.append((self, here, there.copy_(here, non_blocking=True)))
        return there


def _packed(addresses):
    return torch.frombuffer(bytearray(addresses), dtype=torch.int64)
