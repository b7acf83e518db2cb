"""README.md holds true: its commands are run one after the other, as a reader would paste them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakor.checkpoint.reader import resolve
from megakor.config.verbs import VERBS
from megakor.model.specs import num_parameters
from megakor.train.metrics import read_metrics
from tests.config.commands import ROOT, quickly_composed
from tests.documents import blocks, checked, commands
from tests.ranks import free_port

ENGLISH, KOREAN = ROOT / "README.md", ROOT / "README.ko.md"
CLUSTER = 'title="cluster"'
TIMEOUT = 400  # seconds for one command, on a machine that does other work

pytestmark = pytest.mark.timeout(1500)


@dataclass
class Session:
    """A reader's shell: the folder that the commands ran in, and what each wrote to standard output."""

    folder: Path
    output: dict[str, str] = field(default_factory=dict)

    def run(self, command: list[str], name: str) -> None:
        """Run a command in the folder; its exit status must be 0."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert done.returncode == 0, f"{name}\nexit status {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}"
        self.output[name] = done.stdout


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Every command that is not a make target, then every Python block, in order, in one folder."""
    session = Session(tmp_path_factory.mktemp("readme"))
    in_venv = (Path(sys.prefix) / "bin" / "activate").is_file()
    if in_venv:
        (session.folder / ".venv").symlink_to(sys.prefix)
    activate = ""
    for command in commands(ENGLISH):
        words = shlex.split(command)
        if words[0] == "make":
            continue
        if words[0] == "source":
            activate = f"{command} && " if in_venv else ""
            continue
        if words[0] == "deepspeed":  # another launcher may hold the usual port
            command = command.replace("deepspeed", f"deepspeed --master_port {free_port()}", 1)
        session.run(["bash", "-c", activate + command], " ".join(words))
    for block in blocks(ENGLISH):
        if block.language == "python":
            session.run([sys.executable, "-c", block.text], block.text)
    return session


def told(session: Session, beginning: str) -> str:
    """Standard output of the one command that begins so."""
    (output,) = [output for command, output in session.output.items() if command.startswith(beginning)]
    return output


def test_the_arc_by_hand(session: Session) -> None:
    corpus = json.loads((session.folder / "data/corpus/corpus.json").read_text(encoding="utf-8"))
    assert corpus["documents"] >= 150
    assert corpus["splits"]["heldout"]["documents"] >= 1
    figures = json.loads(told(session, "megakor evaluate").splitlines()[-1])
    assert figures["step"] == 40
    assert 0 < figures["bits_per_byte"] < figures["order0_bits_per_byte"]
    assert figures["unigram_bits_per_byte"] > 0
    report = (session.folder / "runs/first/report.html").read_text(encoding="utf-8")
    assert "<html" in report


def test_the_second_pretrain_command_resumes(session: Session) -> None:
    run = session.folder / "runs/first"
    records = read_metrics(run)
    assert [record["step"] for record in records if record["kind"] == "start"] == [0, 30]
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 41))
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    assert resolve(run).name == "step-00000040"


@pytest.mark.parametrize("name", ["first", "tuned"])
def test_the_exports_load(session: Session, name: str) -> None:
    folder = session.folder / "export" / name
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.config.vocab_size == len(tokenizer)
    text = "봄에 심기 좋은 채소는 무엇인가요?\n  1) 상추"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert bool(tokenizer.chat_template) is (name == "tuned")


def test_the_python_block_speaks(session: Session) -> None:
    assert told(session, "from transformers").startswith("옛날 옛적에")


def test_both_languages_have_the_same_commands() -> None:
    shell = [block for block in blocks(ENGLISH) if block.language in ("bash", "python")]
    assert shell == [block for block in blocks(KOREAN) if block.language in ("bash", "python")]
    assert len(commands(ENGLISH)) >= 15
    assert len(commands(ENGLISH, CLUSTER)) >= 5


@pytest.mark.parametrize("command", [*commands(ENGLISH), *commands(ENGLISH, CLUSTER)])
def test_commands_compose(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checked(command)


@pytest.mark.parametrize("readme", [ENGLISH, KOREAN], ids=lambda path: path.name)
def test_tables_are_true(readme: Path) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in readme.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    verbs = {row[0].strip("`"): row[1].replace("`", "") for row in rows if len(row) == 2}
    assert list(verbs) == list(VERBS)
    if readme == ENGLISH:
        assert verbs == {name: verb.summary for name, verb in VERBS.items()}
    experiments = [row for row in rows if len(row) == 6]
    assert len(experiments) == 4
    for name, parameters, tokens, sequences, rate, layout in experiments:
        config = quickly_composed("pretrain", f"experiment={name.strip('`')}")
        assert f"{num_parameters(config.model):,}" == parameters
        assert sequences.startswith(f"{config.train.global_batch_size:,} × {config.train.sequence_length:,}")
        assert config.optimizer.lr == float(rate)
        stages = re.search(r"\d+(?= pipeline stages|단)", layout)
        assert config.parallel.pipeline_parallel_size == int(stages[0] if stages else 1)
        assert layout.endswith(f"ZeRO-{config.parallel.zero_stage}")
        budget = int(re.sub(r"\D", "", tokens)) * (1e9 if tokens.endswith("B") else 1e8)
        per_step = config.train.global_batch_size * config.train.sequence_length
        assert budget <= config.train.num_steps * per_step < budget + per_step
