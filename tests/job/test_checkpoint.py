"""The `checkpoint` section."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_resume.checkpoint.store.retention import KeepBest, KeepRules
from autoglm_resume.errors import UsageError
from autoglm_resume.job.checkpoint import Checkpoint
from autoglm_resume.job.load import keep_of, keep_option, load


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def section(text: str) -> Checkpoint:
    """`text` as the content of a job's `checkpoint`."""
    Path("job.yaml").write_text(f"script: train.py\ncheckpoint: {{{text}}}\n", encoding="utf-8")
    return load("job.yaml").checkpoint


def test_everything_has_a_default() -> None:
    found = section("")
    assert found.every.seconds == 300
    assert found.keep.rules == KeepRules(last=3)
    assert (found.memory, found.on_busy, found.on_error) == (2, "skip", "continue")
    assert (found.timeout, found.compress, found.keyframe_every) == (600, "auto", 8)
    assert (found.rename, found.strict, found.replicas, found.commit) == ({}, True, (), "local")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("5", KeepRules(last=5)),
        ("{last: 5}", KeepRules(last=5)),
        ("{every_steps: 1000}", KeepRules(last=3, every_steps=1000)),
        ("{for: 2d}", KeepRules(last=3, for_seconds=172_800.0)),
        ("{best: {}}", KeepRules(best=KeepBest("loss", 1, "min"))),
        (
            "{last: 1, best: {metric: accuracy, n: 2, mode: max}}",
            KeepRules(last=1, best=KeepBest("accuracy", 2, "max")),
        ),
    ],
)
def test_what_to_keep_is_a_number_or_rules(written: str, meant: KeepRules) -> None:
    assert section(f"keep: {written}").keep.rules == meant
    assert keep_option(written) == meant
    assert keep_of(section(f"keep: {written}").keep.model_dump(by_alias=True), "job") == meant


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("every: often", "every: expected auto or a mapping such as {steps: 500}, found 'often'"),
        ("every: 5", "every: expected auto or a mapping such as {steps: 500}, found 5"),
        ("every: {seconds: soon}", "every.seconds: expected auto, or a duration such as"),
        ("every: {steps: auto}", "every.steps: expected a whole number ≥ 1, found 'auto'"),
        ("keep: 0", "keep: expected a whole number ≥ 1 or a mapping such as"),
        ("keep: [3]", "such as {last: 3, for: 2d}, found a list"),
        ("keep: {for: 0}", "keep.for: expected a duration such as"),
        ("keep: {for_: 1d}", "keep.for_: unknown key, did you mean 'for'?"),
        ("keep: {best: loss}", "keep.best: expected a mapping, found 'loss'"),
        ("keep: {best: {mode: low}}", "keep.best.mode: expected min or max, found 'low'"),
        ("keep: {best: {metric: ''}}", "keep.best.metric: expected a name, found ''"),
        ("memory: 3", "memory: expected a whole number from 0 to 2, found 3"),
        ("memory: true", "memory: expected a whole number from 0 to 2, found true"),
        ("on_busy: queue", "on_busy: expected skip or wait, found 'queue'"),
        ("on_error: ignore", "on_error: expected continue or stop, found 'ignore'"),
        ("timeout: 0s", "timeout: expected a duration such as"),
        ("compress: zstd", "compress: expected auto, fast, small or off, found 'zstd'"),
        ("keyframe_every: 0", "keyframe_every: expected a whole number ≥ 1, found 0"),
        ("rename: [a]", "rename: expected a mapping, found a list"),
        ("rename: {a: }", "rename.a: expected text, found nothing"),
        ("rename: {a: c, b: c}", "rename: two parameters cannot both become 'c'"),
        ("strict: maybe", "strict: expected true or false, found 'maybe'"),
        ("replicas: /nfs", "replicas: expected a list, found '/nfs'"),
        ("replicas: ['ftp://b/c']", "gs://bucket/prefix or az://container/prefix, found 'ftp://b/c'"),
        ("replicas: ['gs://b/c']", "expected gs://bucket/prefix with a bucket of 3 to 63 small"),
        ("replicas: ['az://a_b/c']", "expected az://container/prefix with a container of 3 to 63"),
        ("replicas: ['s3://']", "small letters, digits, dots and hyphens, found 's3://'"),
        ("replicas: ['s3://B_b/c']", "expected s3://bucket/prefix with a bucket of 3 to 63 small"),
        ("replicas: ['s3://a b/c']", "dots and hyphens, found 's3://a b/c'"),
        ("replicas: ['$NOT_SET/x']", "replicas.0: the variable NOT_SET in '$NOT_SET/x' is not set"),
        ("replicas: ['s3://$NOT_SET/']", "the variable NOT_SET in 's3://$NOT_SET/' is not set"),
        ("replicas: ['']", "replicas.0: expected a path, s3://bucket/prefix, gs://bucket/prefix"),
        ("replicas: [3]", "gs://bucket/prefix or az://container/prefix, found 3"),
        ("replicas: [/a, /a/]", "replicas: /a is given twice"),
        ("dir: /a, replicas: [/a/b]", "replicas: /a/b is in checkpoint.dir itself"),
        ("commit: quorum", "commit: quorum needs checkpoint.replicas, and there are none"),
        ("commit: most", "commit: expected local, quorum or all, found 'most'"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as refused:
        section(text)
    (line,) = refused.value.message.splitlines()
    assert line.startswith("job.yaml:2:")
    assert problem in line


def test_replicas_are_expanded_as_all_paths_are(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BUCKET", "models")
    found = section("replicas: ['s3://$BUCKET/run/', ~/copy, copy, /nfs/run/]")
    assert found.replicas == ("s3://models/run", "/home/me/copy", f"{home}/copy", "/nfs/run")


def test_a_directory_beside_the_checkpoints_may_be_a_replica() -> None:
    assert section("dir: /a/b, replicas: [/a/bc], commit: all").replicas == ("/a/bc",)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("three", "--keep three: checkpoint.keep: expected a whole number ≥ 1 or a mapping"),
        ("{lst: 3}", "--keep {lst: 3}: checkpoint.keep.lst: unknown key, did you mean 'last'?"),
        ("{", "--keep {: not valid YAML: "),
        ("", "--keep : checkpoint.keep: expected a whole number ≥ 1 or a mapping"),
    ],
)
def test_a_wrong_option_is_named(option: str, problem: str) -> None:
    with pytest.raises(UsageError) as refused:
        keep_option(option)
    assert refused.value.message.startswith(problem)


def test_what_a_run_directory_holds_may_be_wrong_too() -> None:
    with pytest.raises(UsageError, match=r"^job\.json: checkpoint\.keep\.last: expected a whole"):
        keep_of({"last": "x"}, "job.json")
