"""`megakor checkpoint list`, `verify` and `prune`: what they print, find, leave and refuse."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from megakor import cli
from megakor.checkpoint.__main__ import run as act
from megakor.checkpoint.format import LOCK, MANIFEST, PIECES, CheckpointManifest, committed, step_of
from megakor.checkpoint.inventory import list_checkpoints
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.prune import prune_run
from megakor.checkpoint.reader import newest_whole
from megakor.checkpoint.save import save_checkpoint
from megakor.checkpoint.tensors import write_tensors
from megakor.checkpoint.verify import damages, verify
from megakor.config.compose import main
from megakor.config.schema import CheckpointListConfig, CheckpointPruneConfig, CheckpointVerifyConfig
from megakor.config.verbs import VERBS, find_verb, subverbs
from megakor.files import sha256_of
from tests.checkpoint.pieces import edit, manifest, retable, save, snapshot, whole_pieces
from tests.config.commands import command

PARALLEL = {
    "tensor_parallel_size": 2, "pipeline_parallel_size": 1, "context_parallel_size": 1, "data_parallel_size": 4,
    "zero_stage": 1,
}  # fmt: skip
FILE = "rank-00000.safetensors"


@pytest.fixture
def run(tmp_path: Path, alone: None) -> Path:
    """Checkpoints of steps 10 to 50; the losses fall and rise; 40 is for restarts."""
    folder = tmp_path / "실행 하나"
    for step, loss in ((10, 5.0), (20, 3.0), (30, 4.0), (40, None), (50, 4.5)):
        validation = {"held": loss} if loss is not None else {}
        saved = manifest(step, kept=step != 40, validation=validation)
        saved.train["parallel"] = PARALLEL
        save_checkpoint(folder, saved, whole_pieces(), Keep())
    restart = folder / "checkpoints" / "step-00000040"
    if not restart.exists():  # the next one has replaced it
        shutil.copytree(folder / "checkpoints" / "step-00000050", restart)
        edit(restart, lambda raw: raw.update(step=40, kept=False, validation={}))
    return folder


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    return [step_of(folder) for folder in committed(run)]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------- list


def listed(run: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    list_checkpoints(CheckpointListConfig(run=str(run), format="json"))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_short(at(run, 20) / FILE)
    (at(run, 30) / MANIFEST).write_text("{")
    entries = listed(run, capsys)
    assert [entry["step"] for entry in entries] == [10, 20, 30, 40, 50]
    assert [entry["kept"] for entry in entries] == [True, True, None, False, True]
    assert [entry["latest"] for entry in entries] == [False] * 4 + [True]
    assert [entry["validation"] for entry in entries] == [{"held": 5.0}, {"held": 3.0}, {}, {}, {"held": 4.5}]
    assert [bool(entry["damaged"]) for entry in entries] == [False, True, True, False, False]
    assert f"{FILE}: " in entries[1]["damaged"]
    assert MANIFEST in entries[2]["damaged"]
    first = entries[0]
    files = [path.stat().st_size for path in at(run, 10).iterdir()]
    assert (first["num_bytes"], first["num_files"]) == (sum(files), 3)
    assert (first["layout"], first["world_size"]) == (PARALLEL, 8)
    assert (entries[2]["layout"], entries[2]["world_size"]) == (None, None)


def test_list_as_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_short(at(run, 20) / FILE)
    main("checkpoint list", act, [f"run={run}"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["step", "state", "size", "files", "ranks"]
    rows = {line.split()[0]: line for line in lines[:5]}
    assert "tp 2 × dp 4, ZeRO-1" in rows["10"]
    assert "held 5.0000" in rows["10"]
    assert "damaged" in rows["20"]
    assert "for restarts" in rows["40"]
    assert rows["50"].rstrip().endswith("latest")
    assert lines[5].startswith("step 20 is damaged: ")
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("stage", "ranks", "world_size"), [(1, 6, 6), (1, 5, 6), (3, 2, 2), (0, 1, None)]
)  # fmt: skip
def test_ranks_are_counted_by_their_files(
    run: Path, capsys: pytest.CaptureFixture[str], stage: int, ranks: int, world_size: int | None
) -> None:
    """Where the run left data_parallel_size to the number of processes."""
    name = f"rank-{ranks - 1:05d}.safetensors"
    (at(run, 10) / FILE).rename(at(run, 10) / name)
    retable(at(run, 10), lambda columns: columns.update(file=[name] * len(columns["file"])))

    def change(raw: dict[str, Any]) -> None:
        raw["files"][name] = raw["files"].pop(FILE) if name != FILE else raw["files"][name]
        raw["train"]["parallel"] |= {"data_parallel_size": None, "zero_stage": stage}

    edit(at(run, 10), change)
    entry = listed(run, capsys)[0]
    assert entry["damaged"] is None
    assert entry["world_size"] == world_size


def test_list_of_one_checkpoint(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [entry["step"] for entry in listed(at(run, 30), capsys)] == [30]
    monkeypatch.chdir(at(run, 30))
    assert [entry["step"] for entry in listed(Path(), capsys)] == [30]
    shutil.copytree(at(run, 30), run / "따로")
    assert [(entry["step"], entry["latest"]) for entry in listed(run / "따로", capsys)] == [(30, False)]
    (at(run, 30) / MANIFEST).unlink()
    assert [entry["damaged"] is None for entry in listed(at(run, 30), capsys)] == [False]


# ----------------------------------------------------------------------------------------------------- verify


def test_verify_whole_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(CheckpointVerifyConfig(run=str(run)))
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["whole"] * 5
    assert all(str(at(run, step)) in line for step, line in zip((10, 20, 30, 40, 50), out, strict=True))


def test_verify_names_all_that_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(at(run, 10) / FILE)
    (at(run, 10) / "fremd").touch()
    cut_short(at(run, 20) / FILE)
    (at(run, 20) / PIECES).unlink()
    edit(at(run, 30), lambda raw: raw.update(step=31))
    with pytest.raises(ValueError, match=r"3 of 5 checkpoints damaged"):
        verify(CheckpointVerifyConfig(run=str(run), num_threads=1))
    damaged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: ")]
    for words in (
        ("step-00000010/fremd", "must not be there"),
        (f"step-00000010/{FILE}", "SHA-256 differs"),
        (f"step-00000020/{FILE}", "must be", "bytes"),
        (f"step-00000020/{PIECES}", "missing"),
        ("step-00000030", "step=31", "that of its name"),
    ):
        assert len([line for line in damaged if all(word in line for word in words)]) == 1, words
    assert len(damaged) == 5


def test_verify_ends_with_status_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("checkpoint verify", act, [f"run={at(run, 10)}"])
    flip(at(run, 10) / PIECES)
    with pytest.raises(SystemExit) as ended:
        main("checkpoint verify", act, [f"run={at(run, 10)}"])
    assert ended.value.code == 1
    assert "1 of 1 checkpoints damaged" in capsys.readouterr().err


def rehead(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a rank's file without changing its length, and take over its digest into the manifest."""
    path = folder / FILE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(data[:8] + text + data[8 + length :])
    entry = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    edit(folder, lambda raw: raw["files"].update({FILE: entry}))


NAME = "weight/gpt_neox.final_layer_norm.bias@0"


def moved(header: dict[str, Any]) -> None:
    header[NAME]["data_offsets"] = [number - 4 for number in header[NAME]["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved, f"piece {NAME} is .* in its header; must be as pieces.parquet has it, F32"),
        (lambda header: header[NAME].update(dtype="I32"), f"piece {NAME} is .*I32.* in its header; must be as"),
        (lambda header: header[NAME].update(shape=[1]), f"piece {NAME} is .* in its header; must be as"),
        (lambda header: header.pop(NAME), f"piece {NAME} is not in its header; must be as"),
        (lambda header: header.update({NAME.replace("@0", "@1"): header.pop(NAME)}), "is not in its header|is only in"),
    ],
    ids=["offset", "type", "shape", "gone", "key"],
)
def test_headers_must_agree_with_the_table(run: Path, change: Callable, message: str) -> None:
    rehead(at(run, 10), change)
    CheckpointManifest.load(at(run, 10)).check_contents(at(run, 10))  # its digests are right
    (wrong,) = damages(at(run, 10), 2)
    assert FILE in wrong
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(wrong)


def enter(raw: dict[str, Any], entry: dict[str, Any]) -> None:
    raw["files"][FILE] = entry


def test_a_header_that_is_none(run: Path) -> None:
    path = at(run, 10) / FILE
    for head in (b"\xff" * 8, (4).to_bytes(8, "little") + b"null", (4).to_bytes(8, "little") + b"nope"):
        path.write_bytes(head + path.read_bytes()[len(head) :])
        entry = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        edit(at(run, 10), partial(enter, entry=entry))
        (wrong,) = damages(at(run, 10), 2)
        assert "header cannot be read" in wrong


def test_any_flipped_bit_is_found(run: Path) -> None:
    rng, folder = random.Random(1), at(run, 10)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for _ in range(5):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            assert damages(folder, 2)
        path.write_bytes(data)
    assert damages(folder, 2) == []


# ------------------------------------------------------------------------------------------------------ prune


def pruned(run: Path, **keys: Any) -> None:
    prune_run(CheckpointPruneConfig(run=str(run), **keys))


@pytest.mark.parametrize(
    ("keys", "stay"),
    [
        ({}, [10, 20, 30, 50]),
        ({"keep_last": 1}, [50]),
        ({"keep_last": 2}, [30, 50]),
        ({"keep_last": 9}, [10, 20, 30, 50]),
        ({"keep_last": 1, "keep_every": 20}, [20, 50]),  # 40 is for restarts
        ({"keep_last": 1, "keep_best": "held"}, [20, 50]),
        ({"keep_last": 1, "keep_best": "held", "keep_every": 30}, [20, 30, 50]),
    ],
)
def test_prune_by_rule(run: Path, keys: dict[str, Any], stay: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run)
    pruned(run, **keys, dry_run=True)
    would = capsys.readouterr().out
    assert snapshot(run) == before
    pruned(run, **keys)
    assert steps(run) == stay
    told = capsys.readouterr().out
    assert told.replace("removed", "would remove") == would
    after = snapshot(run)
    after.pop(LOCK, None)
    gone = sum(len(data) for name, data in before.items() if name not in after)
    assert f"{gone:,} bytes; {len(stay)} whole ones stay" in told
    assert after == {name: data for name, data in before.items() if name in after}


def test_the_newest_whole_one_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither one that is damaged in size nor one that is damaged in content counts as such."""
    cut_short(at(run, 50) / FILE)
    flip(at(run, 40) / FILE)
    pruned(run, keep_last=1)
    assert steps(run) == [30, 40, 50]  # damaged ones stay, too
    told = capsys.readouterr().out
    assert told.count("damaged: ") == 2
    assert "damaged=true removes them" in told
    (at(run, 60).with_name("step-00000060.writing")).mkdir()
    pruned(run, keep_last=1, damaged=True)
    assert steps(run) == [30]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000030", "latest"}
    assert (run / "checkpoints" / "latest").read_text() == "step-00000030"
    assert newest_whole(run, contents=True) == at(run, 30)


def test_where_none_is_whole_nothing_goes(run: Path) -> None:
    for folder in committed(run):
        flip(folder / FILE)
    before = snapshot(run)
    with pytest.raises(ValueError, match="must hold a whole checkpoint: every one that is there is damaged"):
        pruned(run, keep_last=1, damaged=True)
    assert {name: data for name, data in snapshot(run).items() if name != LOCK} == before


def test_a_run_that_goes_on_is_refused(run: Path) -> None:
    with FileLock(run / LOCK):
        before = snapshot(run)
        with pytest.raises(ValueError, match=r"must not be going on: another process holds .*\.lock"):
            pruned(run, keep_last=1)
        pruned(run, keep_last=1, dry_run=True)
        assert snapshot(run) == before
    pruned(run, keep_last=1)
    assert steps(run) == [50]


def test_an_unknown_set(run: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_best=other must be one of the sets .*: \['held'\]"):
        pruned(run, keep_last=1, keep_best="other")
    assert steps(run) == [10, 20, 30, 40, 50]


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree

    def fails(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr("megakor.checkpoint.prune.shutil.rmtree", fails)
    with pytest.raises(KeyboardInterrupt):
        pruned(run, keep_last=1)
    assert steps(run) == [20, 30, 40, 50]
    monkeypatch.undo()
    save(run, 60)  # clears what is left
    assert not list((run / "checkpoints").glob("*.writing"))


# ------------------------------------------------------------------------------------------------- bad command lines


def failed(capsys: pytest.CaptureFixture[str], verb: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(f"checkpoint {verb}", act, list(arguments))
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megakor checkpoint {verb}: error: ")
    return line


@pytest.mark.parametrize("verb", ["list", "verify", "prune"])
def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert "없는 곳 must be a run folder" in failed(capsys, verb, f"run={tmp_path / '없는 곳'}")
    assert "must hold at least one checkpoint" in failed(capsys, verb, f"run={tmp_path}")
    (tmp_path / "checkpoints" / "step-00000001.writing").mkdir(parents=True)
    assert "must hold at least one checkpoint" in failed(capsys, verb, f"run={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("list", ["format=xml"], "format=xml must be table or json"),
        ("verify", ["num_threads=0"], "num_threads=0 must be above 0"),
        ("prune", ["keep_last=-1"], "keep_last=-1 must be at least 0"),
        ("prune", ["keep_last=1", "keep_every=-1"], "keep_every=-1 must be at least 0"),
        ("prune", ["keep_every=10"], "keep_every=10 must come with keep_last above 0"),
        ("prune", ["keep_best=held"], "keep_best=held must come with keep_last above 0"),
    ],
)
def test_bad_values(capsys: pytest.CaptureFixture[str], verb: str, arguments: list[str], words: str) -> None:
    assert words in failed(capsys, verb, "run=r", *arguments)


def test_prune_wants_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be a run folder, and is one checkpoint" in failed(capsys, "prune", f"run={at(run, 10)}")


def test_subverbs_are_found() -> None:
    assert find_verb(["checkpoint", "list", "run=r"]) == (VERBS["checkpoint list"], ["run=r"])
    assert find_verb(["export", "run=r"]) == (VERBS["export"], ["run=r"])
    names = [verb.name.split()[1] for verb in subverbs("checkpoint")]
    assert names == ["list", "verify", "prune", "export-universal"]
    for rest in ([], ["run=r"], ["--debug"]):
        with pytest.raises(
            ValueError, match=r"^verb checkpoint must be followed by one of list, verify, prune, export-"
        ):
            find_verb(["checkpoint", *rest])
    with pytest.raises(ValueError, match=r"^subverb verfy of checkpoint must be one of .*; nearest: verify$"):
        find_verb(["checkpoint", "verfy"])
    with pytest.raises(ValueError, match=r"^verb chekpoint must be one of corpus, .*; nearest: checkpoint$"):
        find_verb(["chekpoint", "list"])


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        ([], "launch pretrain"),
        (["--help"], "launch pretrain"),
        (["experiment=demo", "run=r"], "launch pretrain"),
        (["run=r", "experiment=instruct_demo"], "launch instruct"),
    ],
)
def test_launch_alone_launches_the_verb_of_its_experiment(words: list[str], verb: str) -> None:
    assert find_verb(["launch", *words]) == (VERBS[verb], words)
    assert find_verb(["launch", "instruct", *words]) == (VERBS["launch instruct"], words)


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_the_subverbs(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    cli.main(["checkpoint", flag])
    out = capsys.readouterr().out
    assert all(f"  {verb.name} " in out and verb.summary in out for verb in subverbs("checkpoint"))


@pytest.mark.parametrize("words", [["checkpoint"], ["checkpoint", "lst", "run=r"]])
def test_a_missing_or_wrong_subverb_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megakor: error: ")


def test_by_python_m(run: Path) -> None:
    done = command("-m", "megakor.checkpoint", "list", f"run={run}", "format=json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 5


def test_an_empty_file_is_fine(run: Path) -> None:
    """The header of a file without pieces."""
    entry, _ = write_tensors(at(run, 10) / "rank-00001.safetensors", [])
    edit(at(run, 10), lambda raw: raw["files"].update({"rank-00001.safetensors": asdict(entry)}))
    assert damages(at(run, 10), 1) == []
