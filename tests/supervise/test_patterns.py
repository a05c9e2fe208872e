"""Messages as torch 2.13, Python, the kernel and vendors write them, and what they mean."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.kinds import Kind
from autoglm_resume.supervise.patterns import (
    TABLE,
    XIDS,
    Pattern,
    Xid,
    explain,
    faulted,
    in_log,
    match,
    notable,
    oom_victim,
    xid,
)

OOM = (
    "CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity of 23.65 GiB of "
    "which 11.06 MiB is free. Including non-PyTorch memory, this process has 23.60 GiB memory in "
    "use. Of the allocated memory 22.90 GiB is allocated by PyTorch, and 194.87 MiB is reserved by "
    "PyTorch but unallocated."
)
ASYNC = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
WORKER = """Caught {0} in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "/venv/lib/python3.11/site-packages/torch/utils/data/_utils/worker.py", line 374, in \
_worker_loop
    data = fetcher.fetch(index)  # type: ignore[possibly-undefined]
           ^^^^^^^^^^^^^^^^^^^^
  File "/home/me/train.py", line 12, in __getitem__
    raise {0}("{1}")
{0}: {1}
"""
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, {}"

EXCEPTIONS: list[tuple[str, str, Kind]] = [
    ("LossDiverged", "the loss is nan after step 41", Kind.DIVERGED),
    ("ValueError", "The loss returned in `training_step` is nan.", Kind.DIVERGED),
    ("RuntimeError", "found NaN in local forward loss calculation. Device: 3", Kind.DIVERGED),
    ("ValueError", "loss is nan", Kind.DIVERGED),
    (
        "RuntimeError",
        "found NaN in local grad norm for bucket #0 in backward pass before data-parallel "
        "communication collective. Device: 3",
        Kind.DIVERGED,
    ),
    (
        "ValueError",
        "Detected nan and/or inf values in `layer.weight`. Check your forward pass for numerically "
        "unstable operations.",
        Kind.DIVERGED,
    ),
    (
        "RuntimeError",
        "Function 'SqrtBackward0' returned nan values in its 0th output.",
        Kind.DIVERGED,
    ),
    (
        "RuntimeError",
        "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot "
        "be clipped. To disable this error and scale the gradients by the non-finite norm anyway, "
        "set `error_if_nonfinite=False`",
        Kind.DIVERGED,
    ),
    (
        "RuntimeError",
        "probability tensor contains either `inf`, `nan` or element < 0",
        Kind.DIVERGED,
    ),
    ("OutOfMemoryError", OOM, Kind.CUDA_OOM),
    ("OutOfMemoryError", "HIP out of memory. Tried to allocate 2.00 GiB.", Kind.CUDA_OOM),
    ("AcceleratorError", f"CUDA error: out of memory{ASYNC}", Kind.CUDA_OOM),
    (
        "RuntimeError",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        Kind.CUDA_OOM,
    ),
    (
        "DistBackendError",
        NCCL.format(
            "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 2 'out of memory'"
        ),
        Kind.CUDA_OOM,
    ),
    (
        "RuntimeError",
        "DataLoader worker (pid 32028) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your shared memory "
        "limit.",
        Kind.HOST_OOM,
    ),
    (
        "RuntimeError",
        "unable to allocate shared memory(shm) for file </torch_32040_787827343_1>: No space left "
        "on device (28)",
        Kind.HOST_OOM,
    ),
    (
        "RuntimeError",
        "unable to write to file </torch_31911_952036340_6686>: No space left on device (28)",
        Kind.HOST_OOM,
    ),
    (
        "RuntimeError",
        "unable to mmap 29764 bytes from file </torch_10182_3020184674_63991>: Cannot allocate "
        "memory (12)",
        Kind.HOST_OOM,
    ),
    (
        "RuntimeError",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
        Kind.HOST_OOM,
    ),
    ("MemoryError", "", Kind.HOST_OOM),
    (
        "_ArrayMemoryError",
        "Unable to allocate 72.8 TiB for an array with shape (1000000, 10000000) and data type "
        "float64",
        Kind.HOST_OOM,
    ),
    ("OSError", "[Errno 12] Cannot allocate memory", Kind.HOST_OOM),
    ("MemoryError", WORKER.format("MemoryError", ""), Kind.HOST_OOM),
    ("OSError", "[Errno 28] No space left on device: '/data/x'", Kind.DISK_FULL),
    ("OSError", "[Errno 122] Disk quota exceeded: '/data/x'", Kind.DISK_FULL),
    (
        "OSError",
        WORKER.format("OSError", "[Errno 28] No space left on device"),
        Kind.DISK_FULL,
    ),
    ("OSError", "[Errno 5] Input/output error: '/data/x'", Kind.STORAGE),
    ("OSError", "[Errno 116] Stale file handle: '/data/x'", Kind.STORAGE),
    ("OSError", "[Errno 30] Read-only file system: '/data/x'", Kind.STORAGE),
    ("OSError", "[Errno 107] Transport endpoint is not connected: '/data/x'", Kind.STORAGE),
    ("OSError", "[Errno 121] Remote I/O error: '/data/x'", Kind.STORAGE),
    ("OSError", "[Errno 112] Host is down: '/data/x'", Kind.STORAGE),
    ("TimeoutError", "[Errno 110] Connection timed out: '/data/x'", Kind.STORAGE),
    (
        "RuntimeError",
        "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
        Kind.STORAGE,
    ),
    (
        "RuntimeError",
        "[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file "
        "data/4: file write failed",
        Kind.STORAGE,
    ),
    (
        "GenericError",
        "Generic S3 error: Error performing PUT http://127.0.0.1:9000/b/x in 1.2s, after 3 retries",
        Kind.STORAGE,
    ),
    (
        "EndpointConnectionError",
        'Could not connect to the endpoint URL: "https://bucket.s3.amazonaws.com/step-10"',
        Kind.STORAGE,
    ),
    (
        "DistNetworkError",
        "The server socket has failed to listen on any local network address. port: 35987, "
        "useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        Kind.PORT,
    ),
    ("OSError", "[Errno 98] Address already in use: '/data/x'", Kind.PORT),
    (
        "AcceleratorError",
        f"CUDA error: uncorrectable ECC error encountered{ASYNC}",
        Kind.GPU_FAULT,
    ),
    ("AcceleratorError", f"CUDA error: unknown error{ASYNC}", Kind.GPU_FAULT),
    ("NVMLError_GpuIsLost", "GPU is lost", Kind.GPU_FAULT),
    (
        "AcceleratorError",
        "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error: "
        "Uncorrectable NVLink error detected during the execution",
        Kind.GPU_FAULT,
    ),
    ("AcceleratorError", f"CUDA error: no CUDA-capable device is detected{ASYNC}", Kind.GPU_FAULT),
    (
        "AcceleratorError",
        f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{ASYNC}",
        Kind.GPU_FAULT,
    ),
    ("RuntimeError", "No CUDA GPUs are available", Kind.GPU_FAULT),
    (
        "AcceleratorError",
        f"CUDA error: an illegal memory access was encountered{ASYNC}",
        Kind.EXCEPTION,
    ),
    ("AcceleratorError", f"CUDA error: unspecified launch failure{ASYNC}", Kind.EXCEPTION),
    ("AcceleratorError", f"CUDA error: misaligned address{ASYNC}", Kind.EXCEPTION),
    ("RuntimeError", f"CUDA error: device-side assert triggered{ASYNC}", Kind.EXCEPTION),
    (
        "RuntimeError",
        "DataLoader worker (pid 32025) is killed by signal: Killed. ",
        Kind.KILLED,
    ),
    (
        "RuntimeError",
        "DataLoader worker (pid 24899) is killed by signal: Segmentation fault. ",
        Kind.DATA_ERROR,
    ),
    ("RuntimeError", "DataLoader worker (pid(s) 24901) exited unexpectedly", Kind.DATA_ERROR),
    (
        "RuntimeError",
        "DataLoader worker (pid(s) 24901, 24902) exited unexpectedly",
        Kind.DATA_ERROR,
    ),
    ("RuntimeError", "DataLoader timed out after 1 seconds", Kind.DATA_ERROR),
    ("ValueError", WORKER.format("ValueError", "sample is broken"), Kind.DATA_ERROR),
    (
        "ConnectionResetError",
        WORKER.format("ConnectionResetError", "[Errno 104] Connection reset by peer"),
        Kind.DATA_ERROR,
    ),
    ("UnidentifiedImageError", "cannot identify image file '/data/7.jpg'", Kind.DATA_ERROR),
    ("OSError", "image file is truncated (12 bytes not processed)", Kind.DATA_ERROR),
    ("OSError", "[Errno 24] Too many open files: '/dev/null'", Kind.EXCEPTION),
    (
        "RuntimeError",
        "unable to open shared memory object </torch_32178_2076345948_28> in read-write mode: Too "
        "many open files (24)",
        Kind.EXCEPTION,
    ),
    ("RuntimeError", "received 0 items of ancdata", Kind.EXCEPTION),
    ("ModuleNotFoundError", "No module named 'transformerz'", Kind.LAUNCH),
    (
        "ImportError",
        "cannot import name 'nope' from 'torch' (/venv/site-packages/torch/__init__.py)",
        Kind.LAUNCH,
    ),
    ("SyntaxError", "invalid syntax (train.py, line 1)", Kind.LAUNCH),
    ("IndentationError", "unexpected indent (train.py, line 2)", Kind.LAUNCH),
    (
        "RuntimeError",
        f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:2213. This is typically caused "
        "by a remote worker crashing. Check the logs of the remote worker before reporting an "
        "error. GLHF! 🏖️",
        Kind.COMMUNICATION,
    ),
    (
        "RuntimeError",
        f"{GLOO}pair.cc:537] Read error [127.0.0.1]:32169: Connection reset by peer. This is "
        "typically caused by a remote worker hanging or bugs in the application.",
        Kind.COMMUNICATION,
    ),
    ("DistNetworkError", "Broken pipe", Kind.COMMUNICATION),
    (
        "RuntimeError",
        f"{GLOO}unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete",
        Kind.COMMUNICATION,
    ),
    (
        "RuntimeError",
        "[Rank 0]: Rank 1 failed to pass monitoredBarrier in 2000 ms\n Original exception: \n"
        f"{GLOO}unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation to complete",
        Kind.COMMUNICATION,
    ),
    (
        "DistStoreError",
        "Timed out after 4 seconds waiting for clients. 1/2 clients joined.",
        Kind.COMMUNICATION,
    ),
    ("DistStoreError", "wait timeout after 1000ms, keys: /default_pg/0//nokey", Kind.COMMUNICATION),
    (
        "DistNetworkError",
        "The client socket has timed out after 2000ms while trying to connect to (127.0.0.1, 1).",
        Kind.COMMUNICATION,
    ),
    (
        "DistBackendError",
        "NCCL communicator was aborted on rank 0.  Original reason for failure was: [Rank 0] "
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, "
        "Timeout(ms)=600000) ran for 600060 milliseconds before timing out.",
        Kind.COMMUNICATION,
    ),
    ("DistBackendError", "NCCL communicator was aborted on rank 0.", Kind.COMMUNICATION),
    (
        "DistBackendError",
        NCCL.format(
            "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.25.1\n"
            "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or "
            "device error."
        ),
        Kind.COMMUNICATION,
    ),
    (
        "DistBackendError",
        NCCL.format(
            "remote process exited or there was a network error, NCCL version 2.14.3\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process "
            "exiting prematurely."
        ),
        Kind.COMMUNICATION,
    ),
    ("DistBackendError", "ncclInternalError: Internal check failed.", Kind.COMMUNICATION),
    ("RuntimeError", "Socket Timeout", Kind.COMMUNICATION),
    (
        "DistNetworkError",
        "failed to recv, got 0 bytes",
        Kind.COMMUNICATION,
    ),
    (
        "RuntimeError",
        f"{GLOO}pair.cc:534] Application timeout caused pair closure",
        Kind.COMMUNICATION,
    ),
]

LINES: list[tuple[str, Kind]] = [
    ("Loss is nan, stopping training", Kind.DIVERGED),
    ("torch.OutOfMemoryError: " + OOM, Kind.CUDA_OOM),
    (
        '  File "/venv/site-packages/torch/utils/data/_utils/fetch.py", line 54, in fetch',
        Kind.DATA_ERROR,
    ),
    ("  what():  std::bad_alloc", Kind.HOST_OOM),
    (
        "  what():  [PG ID 0 PG GUID 0(default_pg) Rank 7] Process group watchdog thread "
        "terminated with exception: CUDA error: uncorrectable ECC error encountered",
        Kind.GPU_FAULT,
    ),
    (
        "[rank1]:[E626 06:24:44.903881913 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught "
        "collective operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, "
        "NumelOut=9801523, Timeout(ms)=600000) ran for 600020 milliseconds before timing out.",
        Kind.COMMUNICATION,
    ),
    (
        "[E ProcessGroupNCCL.cpp:455] Some NCCL operations have failed or timed out. Due to the "
        "asynchronous nature of CUDA kernels, subsequent GPU operations might run on "
        "corrupted/incomplete data.",
        Kind.COMMUNICATION,
    ),
    (
        "node3:19989:20082 [1] transport/net_ib.cc:1295 NCCL WARN NET/IB : Got completion from "
        "peer 11.214.147.122<39138> with error 12, opcode 0, len 0, vendor err 129",
        Kind.COMMUNICATION,
    ),
    (
        "node3:3468:3905 [4] ib_plugin.c:1615 NCCL WARN NET/IB : Got completion from peer "
        "10.216.210.236<54862> with status=12 opcode=0 len=0 vendor err 129 (Recv)",
        Kind.COMMUNICATION,
    ),
    (
        "[rank3]:[F130 ProcessGroupNCCL.cpp:1557] [PG ID 0 PG GUID 0 Rank 3] ProcessGroupNCCL's "
        "watchdog got stuck for 480 seconds without making progress in monitoring enqueued "
        "collectives.",
        Kind.COMMUNICATION,
    ),
    (
        "  what():  [enforce fail at /__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
        "listener.cc:63] false. accept: Invalid argument",
        Kind.COMMUNICATION,
    ),
    ("train.py: error: unrecognized arguments: --learning-rat 0.1", Kind.LAUNCH),
    ("train.py: error: the following arguments are required: --data", Kind.LAUNCH),
    ("NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus", Kind.GPU_FAULT),
]


@pytest.mark.parametrize(
    ("type", "message", "kind"), EXCEPTIONS, ids=lambda v: str(getattr(v, "value", v))[:40]
)
def test_an_exception_is_what_its_message_says(type: str, message: str, kind: Kind) -> None:
    found = explain(type, message, early=True)
    assert found is not None
    assert found.kind is kind
    assert found.victim == (kind is Kind.COMMUNICATION)


@pytest.mark.parametrize(("line", "kind"), LINES, ids=lambda v: str(getattr(v, "value", v))[:40])
def test_a_line_of_a_log_is_what_it_says(line: str, kind: Kind) -> None:
    log = f"epoch 1\nstep 40 loss 2.1\n{line}\nFatal Python error: Aborted\n\nThread 0x1:\n"
    found = in_log(log, early=True)
    assert found is not None
    assert (found[0].kind, found[1]) == (kind, line.strip())


@pytest.mark.parametrize(
    "regex", [regex for row in TABLE for regex in row.regexes], ids=lambda regex: regex.pattern
)
def test_every_pattern_has_a_real_message(regex: re.Pattern[str]) -> None:
    texts = [f"{type}: {message}" for type, message, _ in EXCEPTIONS] + [line for line, _ in LINES]
    assert any(regex.search(text) for text in texts)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.means)
def test_every_row_is_reached(row: Pattern) -> None:
    texts = [f"{type}: {message}" for type, message, _ in EXCEPTIONS] + [line for line, _ in LINES]
    assert any(match(text, early=True) is row for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: bad",
        "KeyError: 'image'",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)",
        "FileNotFoundError: [Errno 2] No such file or directory: '/data/x'",
        "AssertionError: Torch not compiled with CUDA enabled",
        "RuntimeError: Expected all tensors to be on the same device, but got index is on cuda:0",
        "KeyboardInterrupt: ",
        "",
    ],
)
def test_what_no_row_knows_is_left_open(text: str) -> None:
    assert match(text, early=True) is None


def test_an_import_that_fails_after_the_first_step_is_not_about_the_start() -> None:
    assert explain("ImportError", "No module named 'x'", early=False) is None


def test_the_cause_that_an_exception_was_raised_from_says_more_than_the_exception() -> None:
    trace = """Traceback (most recent call last):
  File "/home/me/train.py", line 5, in step
    next(batches)
RuntimeError: DataLoader worker (pid 32025) is killed by signal: Killed. \n
The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/home/me/train.py", line 9, in <module>
RuntimeError: DataLoader worker (pid(s) 32025) exited unexpectedly
"""
    found = explain(
        "RuntimeError", "DataLoader worker (pid(s) 32025) exited unexpectedly", trace, early=False
    )
    assert found is not None
    assert found.kind is Kind.KILLED


def test_an_exception_that_was_being_handled_is_not_the_cause() -> None:
    trace = """Traceback (most recent call last):
ModuleNotFoundError: No module named 'flash_attn'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
ValueError: bad
"""
    assert explain("ValueError", "bad", trace, early=True) is None


def test_a_data_set_that_fails_without_worker_processes_is_a_data_error() -> None:
    trace = """Traceback (most recent call last):
  File "/home/me/train.py", line 31, in <module>
  File "/venv/lib/python3.11/site-packages/torch/utils/data/_utils/fetch.py", line 54, in fetch
  File "/home/me/data.py", line 9, in __getitem__
KeyError: 'image'
"""
    found = explain("KeyError", "'image'", trace, early=False)
    assert found is not None
    assert found.kind is Kind.DATA_ERROR


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "NVRM: Xid (PCI:0000:44:00): 79, pid=1122, GPU has fallen off the bus.",
            Xid("0000:44:00", 79, 1122),
        ),
        (
            "NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus.",
            Xid("0000:44:00", 79, None),
        ),
        (
            "NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping",
            Xid("0000:10:1c", 63, 1896),
        ),
        (
            "NVRM: Xid (PCI:0000:3b:00): 94, pid='<unknown>', name=<unknown>, Contained: SM",
            Xid("0000:3b:00", 94, None),
        ),
        ("NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.", Xid("0000:01:00", 79, None)),
        # A program's own doing.
        (
            "NVRM: Xid (PCI:0000:00:06): 31, pid=79749, name=exe, Ch 0000000a, MMU Fault: ENGINE "
            "GRAPHICS",
            None,
        ),
        ("eth0: link up", None),
    ],
)
def test_the_kernel_names_broken_gpus(line: str, expected: Xid | None) -> None:
    assert xid(line) == expected
    assert notable(line) == (expected is not None)


KILLED = [
    "Memory cgroup out of memory: Killed process 25266 (python) total-vm:323824kB, "
    "anon-rss:306304kB, file-rss:6640kB, shmem-rss:0kB, UID:0 pgtables:656kB oom_score_adj:0",
    "Out of memory: Killed process 25266 (python3) total-vm:11964kB, anon-rss:4288kB",
]


@pytest.mark.parametrize("line", KILLED)
def test_the_kernel_names_whom_it_killed_for_memory(line: str) -> None:
    assert oom_victim(line) == 25266
    assert notable(line)
    assert oom_victim("oom_reaper: reaped process 25266 (python3), now anon-rss:0kB") is None


def test_the_kernel_names_crashed_processes() -> None:
    line = "python[1234]: segfault at 0 ip 00007f1 sp 00007ffd error 4 in libtorch_cpu.so[7f+1]"
    assert faulted(line) == 1234
    assert faulted("traps: python[77] trap invalid opcode ip:7f sp:7f error:0 in lib.so[7f]") == 77
    assert notable(line)


def test_programs_own_gpu_errors_are_no_faults_of_the_gpu() -> None:
    assert not {13, 31, 43, 45} & XIDS.keys()


@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=300), st.booleans())
def test_no_text_breaks_the_table(type: str, message: str, trace: str, early: bool) -> None:
    found = explain(type, message, trace, early=early)
    assert found is None or found in TABLE
    in_log(message, early=early)
    notable(message)
