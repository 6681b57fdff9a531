"""Which implementation runs, and why."""

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from h3lm.flashconv import measured

Backend = Literal["auto", "reference", "torch", "triton", "gluon"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "triton", "gluon")
ConvAlgorithm = Literal["Toeplitz blocks", "block FFT", "block FFT through memory"]
METHODS = ("auto", "scan", "fft_chunks")
KERNELS = ("triton", "gluon")
KERNEL_OPS = ("h3_core", "h3_end_state", "ssm_conv", "h3_step", "fft_conv")

CHUNK_LENGTH = 64
MAX_TAPS = 128
HEAD_DIMS = (1, 2, 4, 8)
HOPPER_HEAD_DIMS = (1, 8)
MAX_MODES = 64
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# 96 KB are enough for a half dtype, d_state 64 and 64 taps: every GPU from 8.0 on has 99 KB
LARGE_SHARED = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))
HOPPER_SHARED = ((9, 0), (10, 0), (10, 3))
# the longest rows of the block FFT, in one kernel by dtype, and with a factor through device memory
# for half dtypes; with Hopper's shared memory, and with the 99 KB that every GPU from 8.0 on has
MAX_FFT_LENGTH = 8192
FFT_LENGTHS = {
    torch.bfloat16: (MAX_FFT_LENGTH, 2048),
    torch.float16: (MAX_FFT_LENGTH, 1024),
    torch.float32: (2048, 2048),
}
MAX_LONG_LENGTH, MAX_LONG_LENGTH_SMALL = 1 << 22, 1 << 19
# rows of float16 up to which pairs are faster than torch.fft: 0.6 of its time at 131,072, 1.3 to
# 1.6 of it at 1,048,576 (H200), where the outer factor is most of the work
MAX_FASTER_PAIRS = 1 << 19
# lags up to which blocks of a Toeplitz matrix are taken where nothing was measured
MAX_TOEPLITZ_LAGS = 256
# where they were: transforms are faster from 2,048 lags on, whose cost for blocks grows with them
MAX_TIMED_LAGS = 1536
TIMED_LONG_LENGTH = 65536
# they were in bfloat16: of float16, transforms take 1.1 to 1.3 times as long at 512, else 2 (H200)
PAIRS_SLOWER = {"transforms": 2.0}
# a segment of a row is whole tiles of half inputs (two of float32), and at least 8 of them
SEGMENT_UNIT, MIN_SEGMENT = 4096, 8 * 4096
MAX_SHARED_ROW = 2048  # up to this length several rows share a tile of 64 chunks
GLUON_DTYPES = (torch.bfloat16, torch.float16)

logger = logging.getLogger("h3lm.flashconv")

# only whether it is there: importing h3lm imports no Triton
_HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Choice:
    """The implementation of one call.

    Attributes:
        backend: "reference", "torch", "triton" or "gluon".
        reason: One sentence for people.
    """

    backend: str
    reason: str


@dataclass(frozen=True)
class Problem:
    """What a kernel has to deal with in one call.

    Attributes:
        length: L.
        capability: Compute capability of an NVIDIA GPU; None for other devices.
        head_dim: Channels of a head.
        num_modes: Stored complex modes, N/2.
        n_taps: Taps of the short filter, 0 without one.
        chunk_length: T of given operators.
        packed: Whether sequences are packed in one row.
        aligned: Whether every row of every tensor starts at a multiple of 16 elements.
        complex64: Whether the system has that dtype.
        has_triton: Whether Triton is installed.
        lags: Lags that a long filter reaches, both ways; 0 stands for as many as L.
        gated: Whether a convolution, or an SSM's, has a gate.
        rows: B.
        states: Whether an SSM's state comes in or goes out.
        backward: Whether there are gradients.
    """

    length: int
    capability: tuple[int, int] | None = (9, 0)
    head_dim: int = 1
    num_modes: int = 32
    n_taps: int = 64
    chunk_length: int = CHUNK_LENGTH
    packed: bool = False
    aligned: bool = True
    complex64: bool = True
    has_triton: bool = _HAS_TRITON
    lags: int = 0
    gated: bool = False
    rows: int = 64
    states: bool = False
    backward: bool = False


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    problem: Problem | None = None,
) -> Choice:
    """Choose the implementation of an op, a pure function of its arguments.

    Args:
        op: Name of the public op.
        device: Where its tensors are.
        dtype: Their dtype.
        backend: What the user asked for.
        problem: What else decides; a plain one of that device if None.

    Raises:
        ValueError: if `backend` is unknown or cannot do this.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend in ("reference", "torch"):
        return Choice(backend, "asked for by backend=")
    problem = problem or Problem(length=4096, capability=capability(device))
    triton = _triton_lacks(op, device, dtype, problem)
    gluon = triton or _gluon_lacks(op, dtype, problem)
    if backend == "auto":
        if triton:
            return Choice("torch", f"plain PyTorch: {triton}")
        if op == "fft_conv":
            if _torch_transforms_faster(dtype, problem):
                most = f"transforms of rows of {dtype} over {MAX_FASTER_PAIRS}"
                return Choice("torch", f"plain PyTorch: torch.fft is faster for {most}")
            # which algorithm is a question of the sizes, each answer a case for a compiler
            compiling = torch.compiler.is_compiling()
            what = "fft_conv" if compiling else conv_algorithm(dtype, problem)
            return Choice("triton", f"Triton kernel: {what}")
        if gluon:
            return Choice("triton", f"Triton kernel: {gluon}")
        return Choice("gluon", "Hopper kernel")
    lacks = gluon if backend == "gluon" else triton
    if lacks:
        raise ValueError(f"backend={backend!r} cannot run {op} here: {lacks}; use backend='auto'")
    return Choice(backend, "asked for by backend=")


def _triton_lacks(op: str, device: torch.device, dtype: torch.dtype, problem: Problem) -> str:
    """Why the Triton kernels cannot do it; empty if they can."""
    if op not in KERNEL_OPS:
        return f"{op} has no kernel"
    if device.type != "cuda":
        return f"kernels need a CUDA device, the tensors are on {device.type}"
    if not problem.has_triton:
        return "Triton is not installed (pip install triton)"
    if problem.capability is None:
        return "kernels are tested on NVIDIA GPUs only"
    if problem.capability < (8, 0):
        return f"kernels need compute capability 8.0, this GPU has {_version(problem.capability)}"
    if op == "h3_step":
        return _step_lacks(dtype, problem)
    if op == "fft_conv":
        return fft_lacks(dtype, problem)
    long = problem.n_taps > CHUNK_LENGTH and problem.head_dim == 1  # three blocks, backwards 112 KB
    wide = dtype == torch.float32 or problem.num_modes > 32 or long
    if wide and problem.capability not in LARGE_SHARED:
        return "float32, d_state over 64, over 64 taps need 160 KB of shared memory for a program"
    if dtype not in TRITON_DTYPES or not problem.complex64:
        return "kernels take bfloat16, float16 and float32, with complex64 systems"
    if problem.head_dim not in HEAD_DIMS:
        return f"kernels take head_dim 1, 2, 4 and 8, not {problem.head_dim}"
    if problem.num_modes > MAX_MODES:
        return f"kernels take d_state up to {2 * MAX_MODES}"
    if problem.n_taps > MAX_TAPS:
        return f"kernels take up to {MAX_TAPS} taps"
    if problem.chunk_length != CHUNK_LENGTH:
        return f"kernels take operators for chunks of {CHUNK_LENGTH}, not {problem.chunk_length}"
    return ""


def _step_lacks(dtype: torch.dtype, problem: Problem) -> str:
    """Why the kernel of a single step cannot do it: it has no chunks and little shared memory."""
    if dtype not in TRITON_DTYPES or not problem.complex64:
        return "the step kernel takes bfloat16, float16 and float32, with complex64 systems"
    if problem.head_dim not in HEAD_DIMS:
        return f"the step kernel takes head_dim 1, 2, 4 and 8, not {problem.head_dim}"
    if problem.num_modes > MAX_MODES:
        return f"the step kernel takes d_state up to {2 * MAX_MODES}"
    if problem.n_taps > MAX_TAPS:
        return f"the step kernel takes up to {MAX_TAPS} taps"
    return ""


def fft_lacks(dtype: torch.dtype, problem: Problem) -> str:
    """Why the block FFT cannot do it: float32 operands take four times the shared memory."""
    if dtype not in TRITON_DTYPES:
        return "the block FFT takes bfloat16, float16 and float32"
    if dtype == torch.float32 and problem.capability not in HOPPER_SHARED:
        return "the block FFT in float32 needs 224 KB of shared memory for a program"
    if dtype == torch.float32:
        longest = longest_in_a_program(dtype, problem.capability)
    else:
        large = problem.capability in HOPPER_SHARED
        longest = MAX_LONG_LENGTH if large else MAX_LONG_LENGTH_SMALL
    if problem.length > longest:
        return f"here the block FFT takes rows of up to {longest} of {dtype}, not {problem.length}"
    return ""


def longest_in_a_program(dtype: torch.dtype, capability: tuple[int, int] | None) -> int:
    """The longest rows that the block FFT transforms in one kernel."""
    large, small = FFT_LENGTHS[dtype]
    return large if capability in HOPPER_SHARED else small


def _torch_transforms_faster(dtype: torch.dtype, problem: Problem) -> bool:
    """Whether pairs would transform rows longer than those up to which they are the faster ones."""
    if dtype != torch.float16 or problem.length <= MAX_FASTER_PAIRS:
        return False
    if torch.compiler.is_compiling():  # not by what was timed, as above: blocks may take these lags
        return problem.gated or (problem.lags or problem.length) > MAX_TIMED_LAGS
    return conv_algorithm(dtype, problem) == "block FFT through memory"


def conv_algorithm(dtype: torch.dtype, problem: Problem, backward: bool = False) -> ConvAlgorithm:
    """Which kernels of `fft_conv` are the fastest, forward or backward.

    By the nearest measurement. Toeplitz blocks round what is under a gate to its dtype: only
    bfloat16 has the range for that.
    """
    ranged = dtype == torch.bfloat16 or (dtype == torch.float16 and not problem.gated)
    if ranged and _blocks_are_faster(dtype, problem, "backward" if backward else "forward"):
        return "Toeplitz blocks"
    if problem.length <= longest_in_a_program(dtype, problem.capability):
        return "block FFT"
    return "block FFT through memory"


def _blocks_are_faster(dtype: torch.dtype, problem: Problem, way: str) -> bool:
    """Whether Toeplitz blocks are faster than transforms, one way."""
    lags = problem.lags or problem.length
    table = measured.ALGORITHMS.get(_generation(problem))
    if table is None:
        return lags <= MAX_TOEPLITZ_LAGS
    if lags > MAX_TIMED_LAGS:
        return False
    length, rows = problem.length, problem.rows
    if length > MAX_FFT_LENGTH:
        # Transforms through memory, timed at one length: both ways then grow with the elements
        rows, length = max(1, rows * length // TIMED_LONG_LENGTH), TIMED_LONG_LENGTH
    kinds = ("yes" if problem.gated else "no",)
    slower = PAIRS_SLOWER if dtype == torch.float16 else None
    return table.faster(kinds, (lags, length, rows), way, slower) == "blocks"


def choose_method(
    method: str, diagonal: bool, device: torch.device, problem: Problem, dtype: torch.dtype
) -> Choice:
    """Choose the algorithm of `ssm_conv`, by its arguments and by whether a compiler asks.

    By the nearest measurement. Where there is none near, under a gate, and under a compiler, for
    which each answer would be a case of its own, by bytes: in a half dtype the scan's kernels read
    and write an element once, in 4 bytes; convolved chunks do that too, and make states and what
    states add in float32 besides.

    Args:
        method: "scan", "fft_chunks" or "auto".
        diagonal: Whether the system is diagonal.
        device: Where the tensors are.
        problem: As in `choose`.
        dtype: Of the tensors.

    Returns:
        The method in the place of the backend.

    Raises:
        ValueError: if the method is unknown or cannot run this system.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if not diagonal and method == "scan":
        raise ValueError("method='scan' is for diagonal systems: use 'fft_chunks' or 'auto'")
    if method != "auto":
        return Choice(method, "asked for by method=")
    if not diagonal:
        return Choice("fft_chunks", "the system is not diagonal")
    if problem.packed:
        return Choice("scan", "packed sequences are scanned at once, and convolved one by one")
    if device.type == "cuda" and problem.num_modes > MAX_MODES:
        return Choice("fft_chunks", f"the scan's kernels take d_state up to {2 * MAX_MODES}")
    if device.type != "cuda" or torch.compiler.is_compiling():
        return _SCAN_BY_BYTES
    return _measured_method(dtype, problem)


def _measured_method(dtype: torch.dtype, problem: Problem) -> Choice:
    """The faster of both methods for a diagonal system on a GPU.

    Without gates, as they were timed: under one, chunks of half inputs take other and slower
    convolutions.
    """
    if problem.gated and dtype != torch.float32:
        return _SCAN_BY_BYTES
    table = measured.METHODS.get(_generation(problem))
    kinds = (
        "float32" if dtype == torch.float32 else "bfloat16",
        "64" if problem.num_modes <= 32 else "128",
        "yes" if problem.states else "no",
    )
    asked = kinds, (problem.length, problem.rows), "both" if problem.backward else "forward"
    way = None if table is None else table.faster(*asked)
    return _SCAN_BY_BYTES if table is None or way is None else Choice(way, table.said(*asked))


_SCAN_BY_BYTES = Choice("scan", "diagonal systems are scanned with the fewest bytes")


def _generation(problem: Problem) -> int:
    """Major number of the compute capability, 0 without one."""
    return 0 if problem.capability is None else problem.capability[0]


def _gluon_lacks(op: str, dtype: torch.dtype, problem: Problem) -> str:
    """Why the Hopper kernel cannot do what the Triton kernels can; empty if it can."""
    if problem.capability is None or problem.capability[0] != 9:
        return "the other kernel is for Hopper GPUs"
    if op not in ("h3_core", "h3_end_state"):
        return "the Hopper kernel is for h3_core"
    if problem.head_dim not in HOPPER_HEAD_DIMS:
        return "the Hopper kernels take head_dim 1 and 8"
    if problem.packed:
        return "the Hopper kernel takes no cu_seqlens"
    if dtype not in GLUON_DTYPES:
        return "the Hopper kernel takes bfloat16 and float16"
    heads = problem.head_dim > 1
    if problem.num_modes != 32 or (problem.n_taps > 64 and not heads):
        return "the Hopper kernel takes d_state 64 and up to 64 taps"
    if heads and problem.length % CHUNK_LENGTH:
        return f"the Hopper kernel of heads takes lengths that are multiples of {CHUNK_LENGTH}"
    if problem.length % 16 or not problem.aligned:
        return "the Hopper kernel takes lengths and strides that are multiples of 16"
    return ""


def segments(programs: int, L: int, multiprocessors: int) -> int:
    """Into how many segments the kernels cut a row to fill a GPU, a pure function.

    Two programs fit on a multiprocessor. Segments cost a second pass
    over k and v (and q and do), so there are at least as many as double the programs, each long
    enough to pay for its start.

    Args:
        programs: How many walk along rows: one for each row of a channel, or for 64 pairs of
            channels where heads have several.
        L: Length of a row.
        multiprocessors: Of the GPU.
    """
    wanted = 2 * multiprocessors // max(1, programs)
    if wanted < 2 or L < 2 * MIN_SEGMENT:
        return 1
    tiles = -(-L // SEGMENT_UNIT)
    length = -(-tiles // min(wanted, L // MIN_SEGMENT))
    return -(-tiles // length)


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def is_aligned(x: Tensor) -> bool:
    """Whether each row of (B, D, L) starts at a multiple of 16 elements, and near enough.

    While PyTorch compiles, offsets are not known: the answer is yes, and the operator looks again.
    """
    if torch.compiler.is_compiling():
        return True
    rows = 0 if x.shape[0] == 1 else x.stride(0)
    channels = 0 if x.shape[1] == 1 else x.stride(1)
    aligned = x.storage_offset() % 16 == 0 and rows % 16 == 0 and channels % 16 == 0
    # rows that share a tile lie at offsets of 32 bits
    near = rows < 2**28 or x.shape[2] > MAX_SHARED_ROW
    return aligned and x.stride(2) == 1 and near


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if torch.compiler.is_compiling():  # it does not look into a cache
        return torch.cuda.get_device_capability(device)
    return _cuda_capability(device)


@cache
def _cuda_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def announce(op: str, choice: Choice) -> None:
    """Log a choice once for each op and reason."""
    if not torch.compiler.is_compiling():
        _announce_once(op, choice)


@cache
def _announce_once(op: str, choice: Choice) -> None:
    logger.info("%s: %s (%s)", op, choice.backend, choice.reason)
