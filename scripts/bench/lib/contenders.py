"""What `save` compares, each with the options that are best for it on a machine without a GPU.

All save the state of the same training (`model` and `optimizer` of train_gpt.Training) when they
are told to, flushed to the disk, under the name of the step.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType


class Nothing:
    """Training that does not save; what the others derive from."""

    def __init__(self, training: Any, directory: Path) -> None:
        self.training, self.directory = training, directory
        self.saved = 0
        """The newest step that was to be saved."""
        self.set_up()

    def set_up(self) -> None:
        """What is done before training."""

    def step_done(self, step: int, save: bool = False) -> None:
        """Called after every step, with whether its state is to be saved."""
        if save:
            self.saved = step
            self.save(self.directory / f"{step:06}")

    def save(self, path: Path) -> None:
        """Begin, or do, the checkpoint of now."""

    def fence(self) -> None:
        """Called before the optimizer changes the state."""

    def finished(self) -> bool:
        """Whether the newest checkpoint is on the disk."""
        return True

    def tidy(self) -> None:
        """Delete older checkpoints; not counted."""
        for path in sorted(self.directory.iterdir())[:-1]:
            shutil.rmtree(path)

    def close(self) -> None:
        """End it."""

    def state(self) -> dict[str, Any]:
        """All that is to be saved."""
        training = self.training
        return {
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
        }


class TorchSave(Nothing):
    """torch.save and fsync, then the name."""

    def save(self, path: Path) -> None:
        path.mkdir()
        with (path / "new").open("wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())
        (path / "new").rename(path / "checkpoint.pt")
        for directory in (path, path.parent):
            fd = os.open(directory, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


class Dcp(Nothing):
    """torch.distributed.checkpoint; plans are kept, and so is the memory it stages in."""

    shared, asynchronous_staging = False, False

    def set_up(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=self.shared,
                use_async_staging=self.asynchronous_staging,
                use_non_blocking_copy=False,
            )
        )
        self.staged: Future[Any] | None = None
        self.future: Future[Any] | None = None

    def save(self, path: Path) -> None:
        dcp.save(self.state(), storage_writer=dcp.FileSystemWriter(path), planner=self.planner())

    def begin(self, path: Path, kind: AsyncCheckpointerType) -> None:
        """Begin an asynchronous save; the one before must be through, it uses the same memory."""
        if self.future is not None:
            self.future.result()
        answer: Any = dcp.async_save(
            self.state(),
            storage_writer=dcp.FileSystemWriter(path),
            planner=self.planner(),
            async_checkpointer_type=kind,
            async_stager=self.stager,
        )
        if self.asynchronous_staging:
            self.staged, self.future = answer.staging_completion, answer.upload_completion
        else:
            self.future = answer

    @staticmethod
    def planner() -> dcp.SavePlanner:
        """With the plan of the save before."""
        return dcp.DefaultSavePlanner(enable_plan_caching=True)

    def fence(self) -> None:
        if self.staged is not None:
            self.staged.result()
            self.staged = None

    def finished(self) -> bool:
        if self.future is None:
            return True
        if self.future.done():
            self.future.result()  # raises what went wrong
            return True
        return False

    def close(self) -> None:
        if self.future is not None:
            self.future.result()
        self.stager.close()
        dist.destroy_process_group()


class DcpThread(Dcp):
    """dcp.async_save in a thread."""

    def save(self, path: Path) -> None:
        self.begin(path, AsyncCheckpointerType.THREAD)


class DcpProcess(Dcp):
    """dcp.async_save in a process, staged in shared memory."""

    shared = True

    def save(self, path: Path) -> None:
        self.begin(path, AsyncCheckpointerType.PROCESS)


class DcpProcessStaging(DcpProcess):
    """The same, staged by a thread during the next step; the optimizer waits for it."""

    asynchronous_staging = True


class DlRover(Nothing):
    """DLRover's flash checkpoint: to shared memory, and from there to the disk by a process.

    It does not flush what it writes.
    """

    def set_up(self) -> None:
        # Names its sockets and its shared memory, which outlive it.
        os.environ["TORCHELASTIC_RUN_ID"] = self.run = f"bench-{os.getpid()}"
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

        # Before there is a process group: its threads do not survive that DLRover forks.
        self.checkpointer: Any = DdpCheckpointer(str(self.directory))

    def save(self, path: Path) -> None:
        from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType

        self.checkpointer.save_checkpoint(
            self.saved, self.state(), str(path / "checkpoint.pt"), storage_type=StorageType.DISK
        )

    def finished(self) -> bool:
        try:
            tracker = (self.directory / "dlrover_latest.txt").read_text()
        except FileNotFoundError:
            return self.saved == 0
        return tracker.strip() == str(self.saved)

    def tidy(self) -> None:
        found = [path for path in self.directory.iterdir() if path.name.isdecimal()]
        for path in sorted(found)[:-1]:
            shutil.rmtree(path)

    def close(self) -> None:
        for left in Path("/dev/shm").glob(f"*{self.run}*"):
            left.unlink()
        shutil.rmtree(Path("/tmp/ckpt_sock") / self.run, ignore_errors=True)


class Autoglm(Nothing):
    """autoglm as a script alone uses it."""

    def set_up(self) -> None:
        import autoglm_resume as autoglm

        self.session = autoglm.init(checkpoint_dir=str(self.directory), every_steps=1_000_000)
        self.session.track(model=self.training.model, optimizer=self.training.optimizer)
        self.session.resume()

    def step_done(self, step: int, save: bool = False) -> None:
        self.session.step_done(step - 1)
        super().step_done(step, save)

    def save(self, path: Path) -> None:
        self.session.save()

    def finished(self) -> bool:
        return self.saved == 0 or self.committed() is not None

    def committed(self) -> Path | None:
        """The newest checkpoint, if it is one already."""
        found = self.directory.glob(f"step-{self.saved:010}.*/manifest.json")
        return next((manifest.parent for manifest in found), None)

    def tidy(self) -> None:
        """It does that itself, and it counts."""

    def memory(self) -> dict[str, int]:
        """Bytes that its saver has now: of its own, and of the slots that it shares with us."""
        (saver,) = psutil.Process().children()
        status = Path(f"/proc/{saver.pid}/status").read_text()
        found = dict(line.split(":", 1) for line in status.splitlines())
        names = {"own": "RssAnon", "shared": "RssShmem"}
        return {key: int(found[name].split()[0]) * 1024 for key, name in names.items()}


CONTENDERS = {
    "none": Nothing,
    "torch.save": TorchSave,
    "dcp": Dcp,
    "dcp-thread": DcpThread,
    "dcp-process": DcpProcess,
    "dcp-process-staging": DcpProcessStaging,
    "dlrover": DlRover,
    "autoglm": Autoglm,
}
