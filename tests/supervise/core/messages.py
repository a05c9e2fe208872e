"""Messages as torch 2.13, Python, NCCL and libraries write them, and the class each is of."""

from __future__ import annotations

from autoglm_resume.failures import Kind

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
