"""Every rule of `megakor.config.checks`, with a value that breaks it."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

from megakor.config import checks, cluster_checks, data_checks, verb_checks
from megakor.config.checks import OWNED_DEEPSPEED_KEYS, check, check_fit
from tests.config.commands import NEEDED, composed, quickly_composed

FP32 = ["train.precision=fp32"]

BAD: list[tuple[str, list[str], str, str]] = [
    # model
    *[
        ("pretrain", [f"model.{name}={value}"], f"model.{name}={value}", "be above 0")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                     "make_vocab_size_divisible_by", "max_position_embeddings")
        for value in (0, -1)
    ],
    ("pretrain", ["model.initializer_range=0"], "model.initializer_range=0.0", "be above 0"),
    ("pretrain", ["model.hidden_size=30", "model.num_attention_heads=8"], "model.hidden_size=30",
     "be divisible by model.num_attention_heads=8"),
    ("pretrain", ["model.rotary_pct=0.0"], "model.rotary_pct=0.0", "lie in (0, 1]"),
    ("pretrain", ["model.rotary_pct=1.5"], "model.rotary_pct=1.5", "lie in (0, 1]"),
    ("pretrain", ["model.rotary_pct=0.1"], "model.rotary_pct=0.1",
     "rotate an even, positive number of the 32 dimensions of a head, not 3"),
    ("pretrain", ["model.rotary_pct=0.01"], "model.rotary_pct=0.01",
     "rotate an even, positive number of the 32 dimensions of a head, not 0"),
    # layout
    *[
        ("pretrain", [f"parallel.{name}={value}"], f"parallel.{name}={value}", "be above 0")
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "data_parallel_size")
        for value in (0, -2)
    ],
    ("pretrain", ["parallel.tensor_parallel_size=3"], "parallel.tensor_parallel_size=3",
     "divide model.num_attention_heads=4; nearest: 2 or 4"),
    ("pretrain", ["parallel.tensor_parallel_size=8"], "parallel.tensor_parallel_size=8",
     "divide model.num_attention_heads=4; nearest: 4"),
    ("pretrain", ["parallel.tensor_parallel_size=4", "model.intermediate_size=258"], "parallel.tensor_parallel_size=4",
     "divide model.intermediate_size=258; nearest: 3 or 6"),
    ("pretrain", ["parallel.tensor_parallel_size=4", "model.vocab_size=1002"], "parallel.tensor_parallel_size=4",
     "divide model.vocab_size=1002; nearest: 3 or 6"),
    ("pretrain", ["parallel.tensor_parallel_size=4", "model.make_vocab_size_divisible_by=2"],
     "parallel.tensor_parallel_size=4", "divide model.make_vocab_size_divisible_by=2; nearest: 2"),
    ("pretrain", ["parallel.context_parallel_size=3"], "parallel.context_parallel_size=3",
     "divide train.sequence_length=64; nearest: 2 or 4"),
    ("pretrain", ["parallel.context_parallel_size=8"], "parallel.context_parallel_size=8",
     "divide model.num_attention_heads=4 / parallel.tensor_parallel_size=1 = 4; nearest: 4"),
    ("pretrain", ["parallel.context_parallel_size=4", "parallel.tensor_parallel_size=2"],
     "parallel.context_parallel_size=4",
     "divide model.num_attention_heads=4 / parallel.tensor_parallel_size=2 = 2; nearest: 2"),
    ("pretrain", ["parallel.context_parallel_size=2", "parallel.pipeline_parallel_size=2"],
     "parallel.context_parallel_size=2", "be 1 with parallel.pipeline_parallel_size=2"),
    ("pretrain", ["parallel.sequence_parallel=true"], "parallel.sequence_parallel=True",
     "be false with parallel.tensor_parallel_size=1"),
    ("pretrain", ["parallel.sequence_parallel=true", "parallel.tensor_parallel_size=4", "train.sequence_length=30"],
     "parallel.tensor_parallel_size=4",
     "divide train.sequence_length=30 / parallel.context_parallel_size=1 = 30; nearest: 3 or 5"),
    ("pretrain", ["parallel.zero_stage=0", "parallel.tensor_parallel_size=2", *FP32], "parallel.zero_stage=0",
     "be 1 or more with parallel.tensor_parallel_size=2"),
    ("pretrain", ["parallel.offload_parameters=true"], "parallel.offload_parameters=True",
     "be false with parallel.zero_stage=1"),
    ("pretrain", ["parallel.offload_optimizer=true", "parallel.zero_stage=0", *FP32], "parallel.offload_optimizer=True",
     "be false with parallel.zero_stage=0"),
    ("pretrain", ["parallel.offload_optimizer=true", "parallel.pipeline_parallel_size=2"],
     "parallel.offload_optimizer=True", "be false with parallel.pipeline_parallel_size=2"),
    ("pretrain", ["parallel.offload_optimizer=true", "optimizer.name=adafactor"], "parallel.offload_optimizer=True",
     "be false with optimizer.name=adafactor"),
    *[("pretrain", [f"model.{name}={value}"], f"model.{name}={value}", "lie in [0, 1)")
      for name in ("hidden_dropout", "attention_dropout") for value in (1.0, -0.1)],
    ("pretrain", ["parallel.zero_stage=4"], "parallel.zero_stage=4", "be 0, 1, 2 or 3"),
    ("pretrain", ["parallel.zero_stage=-1"], "parallel.zero_stage=-1", "be 0, 1, 2 or 3"),
    *[
        ("pretrain", [f"parallel.zero_stage={stage}", "parallel.pipeline_parallel_size=2"],
         f"parallel.zero_stage={stage}", "be 1 with parallel.pipeline_parallel_size=2")
        for stage in (0, 2, 3)
    ],
    ("pretrain", ["parallel.zero_stage=0"], "parallel.zero_stage=0", "be 1 or more unless train.precision=fp32"),
    ("pretrain", ["parallel.pipeline_partition=layers"], "parallel.pipeline_partition=layers",
     "be parameters, uniform or type:REGEX"),
    ("pretrain", ["parallel.pipeline_parallel_size=3"], "parallel.pipeline_parallel_size=3",
     "be at most model.num_hidden_layers=2"),
    # training
    *[
        ("pretrain", [f"train.{name}={value}"], f"train.{name}={value}", "be above 0")
        for name in ("num_steps", "global_batch_size", "micro_batch_size", "sequence_length")
        for value in (0, -1)
    ],
    ("pretrain", ["train.activation_checkpointing_interval=0"], "train.activation_checkpointing_interval=0",
     "be above 0"),
    ("pretrain", ["train.clip_grad_norm=-1"], "train.clip_grad_norm=-1.0", "be at least 0"),
    ("pretrain", ["train.sequence_lengths={100: 48}"], "train.sequence_lengths.100=48",
     "divide train.sequence_length=64; nearest: 32 or 64"),
    ("pretrain", ["train.sequence_lengths={100: 2}", "parallel.tensor_parallel_size=4",
                  "parallel.sequence_parallel=true"], "parallel.tensor_parallel_size=4",
     "divide train.sequence_length=2 / parallel.context_parallel_size=1 = 2"),
    ("pretrain", ["train.batch_sizes={0: 4}"], "train.batch_sizes=0", "have keys above 0"),
    ("pretrain", ["train.batch_sizes={5: 0}"], "train.batch_sizes.5=0", "be above 0"),
    ("pretrain", ["data.skip=[[5, 5]]"], "data.skip=[5, 5]", "be [first, one after the last]"),
    ("pretrain", ["data.max_epochs.wiki=2"], "data.max_epochs=wiki", "name one of data.sources"),
    ("pretrain", ["data.train=null", "data.sources={a: x, b: y}", "data.weights.a=2"], "data.weights={'a': 2.0}",
     "have one weight for each of data.sources: ['a', 'b']"),
    ("pretrain", ["data.train=null", "data.sources={a: x, b: y}", "data.weights={a: -1, b: 2}"],
     "data.weights={'a': -1.0, 'b': 2.0}", "be numbers that are not negative, and not all 0"),
    ("pretrain", ["data.train=null", "data.sources={a: x, b: y}", "data.weights={a: 0, b: 0}"],
     "data.weights={'a': 0.0, 'b': 0.0}", "be numbers that are not negative, and not all 0"),
    ("pretrain", ["data.train=null", "data.sources={a: x, b: y}", "data.weights={a: 1, b: 1}", "data.temperature=2"],
     "data.temperature=2.0", "be 1 with data.weights"),
    ("pretrain", ["data.train=null", "data.sources={a: x, b: y}", "data.curriculum={0: {a: 1, b: 1}}"],
     "data.curriculum=0", "have keys above 0"),
    ("pretrain", ["data.train=null", "data.sources={a: x, b: y}", "data.curriculum={9: {a: 1, b: x}}"],
     "data.curriculum.9={'a': 1, 'b': 'x'}", "be numbers"),
    ("pretrain", ["data.shuffle_buffer=-1"], "data.shuffle_buffer=-1", "be at least 0"),
    ("pretrain", ["data.temperature=0"], "data.temperature=0.0", "be above 0"),
    *[
        ("pretrain", [f"data.{name}=0"], f"data.{name}=0", "be above 0")
        for name in ("num_streams", "shuffle_window", "cache_size")
    ],
    ("pretrain", ["train.sequence_length=4096"], "train.sequence_length=4096",
     "be at most model.max_position_embeddings=2048"),
    ("pretrain", ["optimizer.lr=0"], "optimizer.lr=0.0", "be above 0"),
    ("pretrain", ["optimizer.eps=0"], "optimizer.eps=0.0", "be above 0"),
    ("pretrain", ["optimizer.weight_decay=-0.1"], "optimizer.weight_decay=-0.1", "be at least 0"),
    ("pretrain", ["optimizer.beta1=1"], "optimizer.beta1=1.0", "lie in [0, 1)"),
    ("pretrain", ["optimizer.beta2=-0.5"], "optimizer.beta2=-0.5", "lie in [0, 1)"),
    *[
        ("pretrain", [f"schedule.{name}={value}"], f"schedule.{name}={value}", "lie in [0, 1]")
        for name in ("warmup_ratio", "decay_ratio", "min_lr_ratio")
        for value in (-0.1, 1.1)
    ],
    ("pretrain", ["checkpoint.keep_last=-1"], "checkpoint.keep_last=-1", "be at least 0"),
    *[
        ("pretrain", [f"checkpoint.{name}=-1"], f"checkpoint.{name}=-1", "be at least 0")
        for name in ("interval", "keep_every", "restart_interval")
    ],
    ("pretrain", ["checkpoint.keep_best=news", "+data.validation.wiki=v"], "checkpoint.keep_best=news",
     "name one of the held-out sets: ['wiki']"),
    ("instruct", ["checkpoint.keep_best=news"], "checkpoint.keep_best=news", "held-out sets: ['pairs']"),
    ("pretrain", ["checkpoint.interval=0", "checkpoint.keep_every=10"], "checkpoint.keep_every=10",
     "be 0 with checkpoint.interval=0"),
    ("pretrain", ["checkpoint.keep_every=1500"], "checkpoint.interval=1000",
     "divide checkpoint.keep_every=1500"),
    *[
        ("pretrain", [f"health.{name}=0"], f"health.{name}=0", "be above 0")
        for name in ("skip_limit", "spike_window")
    ],
    ("pretrain", ["health.spike_threshold=0"], "health.spike_threshold=0.0", "be above 0"),
    ("pretrain", ["health.hang_seconds=0"], "health.hang_seconds=0.0", "be above 0"),
    *[
        ("pretrain", [f"health.{name}=-1"], f"health.{name}=-1", "be at least 0")
        for name in ("spike_skip", "roll_back_limit", "replica_check_interval")
    ],
    ("pretrain", ["health.hang_seconds=1800"], "health.hang_seconds=1800.0", "be below 1800"),
    ("pretrain", ["health.replica_check_interval=5", "parallel.zero_stage=3"], "health.replica_check_interval=5",
     "leaves no replicas to compare"),
    ("pretrain", ["health.on_spike=act", "data.train=null", "+data.dataset.path=json"], "health.on_spike=act",
     "a stretch can be left out of shards alone"),
    ("instruct", ["health.on_spike=act"], "health.on_spike=act", "of pretraining shards alone"),
    ("pretrain", ["launch.num_ranks=0"], "launch.num_ranks=0", "be above 0"),
    ("pretrain", ["launch.restarts=-1"], "launch.restarts=-1", "be at least 0"),
    ("pretrain", ["launch.pause_seconds=-1"], "launch.pause_seconds=-1.0", "be at least 0"),
    ("tune", ["format=xml"], "format=xml", "be table or json"),
    ("tune", ["cluster.gpus=null"], "cluster.gpus=None", "name the accelerators"),
    ("tune", ["cluster.gpus=many"], "cluster.gpus=many", "be number x kind"),
    ("tune", ["num_layouts=0"], "num_layouts=0", "be above 0"),
    ("tune", ["num_steps=0"], "num_steps=0", "be above 0"),
    ("tune", ["warmup_steps=-1"], "warmup_steps=-1", "be at least 0"),
    ("preflight", ["format=xml"], "format=xml", "be table or json"),
    ("preflight", ["wait_seconds=0"], "wait_seconds=0.0", "be above 0"),
    ("preflight", ["slow_below=1"], "slow_below=1.0", "lie in [0, 1)"),
    ("preflight", ["out=h.yaml"], "out=h.yaml", "come with watts"),
    ("preflight", ["out=h.yaml", "watts=0"], "watts=0.0", "be above 0"),
    # machines
    *[
        ("pretrain", [f"cluster.{name}={value}"], f"cluster.{name}={shown}", "be above 0")
        for name, value, shown in [("num_nodes", 0, "0"), ("ranks_per_node", -1, "-1"), ("price_krw", 0, "0.0"),
                                   ("price_krw", -5, "-5.0"), ("krw_per_usd", 0, "0.0")]
    ],
    *[("pretrain", [f"cluster.master_port={port}"], f"cluster.master_port={port}", "lie between 1 and 65535")
      for port in (0, 65536)],
    ("pretrain", ["cluster.include=a", "cluster.exclude=b"], "cluster.exclude=b", "be empty with cluster.include"),
    ("launch pretrain", ["cluster=torchrun", "cluster.ssh=true"], "cluster.ssh=True", "be false with cluster.kind="),
    ("launch pretrain", ["cluster=openmpi", "cluster.ssh=false"], "cluster.ssh=False", "be true with cluster.kind="),
    ("launch pretrain", ["cluster=torchrun", "cluster.node_rank=-1"], "cluster.node_rank=-1", "be at least 0"),
    ("launch pretrain", ["cluster=deepspeed", "cluster.node_rank=1"], "cluster.node_rank=1",
     "be null with cluster.ssh=true"),
    ("launch pretrain", ["cluster.environment={a-b: c}"], "cluster.environment=a-b", "be a name of an environment"),
    ("launch pretrain", ["cluster.secrets=[A B]"], "cluster.secrets=A B", "be a name of an environment variable"),
    ("launch pretrain", ["cluster.environment.WANDB_API_KEY=k"], "cluster.environment.WANDB_API_KEY",
     "be left out, and named in cluster.secrets"),
    ("launch pretrain", ["cluster.environment.HF_TOKEN=k"], "cluster.environment.HF_TOKEN", "be left out"),
    ("launch pretrain", ["cluster.environment.PRIVATE=k", "cluster.secrets=PRIVATE"], "cluster.environment.PRIVATE",
     "be left out"),
    ("launch pretrain", ["cluster.environment={A: 'b\nc'}"], "cluster.environment.A='b\\nc'", "be of one line"),
    ("launch pretrain", ["cluster.slurm.notice_seconds=0"], "cluster.slurm.notice_seconds=0", "be above 0"),
    ("launch pretrain", ["cluster.slurm.options=exclusive"], "cluster.slurm.options=exclusive", "be options of sbatch"),
    *[("launch pretrain", [f"cluster.kubernetes.{name}=A_b"], f"cluster.kubernetes.{name}=A_b", "be lower-case letters")
      for name in ("namespace", "volume_claim")],
    ("launch pretrain", ["cluster.kubernetes.mount_path=work"], "cluster.kubernetes.mount_path=work", "begin with /"),
    ("launch pretrain", ["cluster.kubernetes.shared_memory=64GB"], "cluster.kubernetes.shared_memory=64GB",
     "be a size as Kubernetes writes it"),
    ("launch pretrain", ["cluster=slurm", "launch.num_ranks=8"], "launch.num_ranks=8", "be null with cluster.kind="),
    *[("launch pretrain", ["cluster=deepspeed", "cluster.ssh=false", f"launch.{key}"], f"launch.{shown}", rule)
      for key, shown, rule in [("restarts=3", "restarts=3", "be 0 with cluster.ssh=false"),
                               ("elastic=true", "elastic=True", "be false with cluster.kind=deepspeed")]],
    ("launch pretrain", ["cluster=slurm", "launch.elastic=true"], "launch.elastic=True", "as many nodes at"),
    ("evaluate", ["cache_size=0"], "cache_size=0", "be above 0"),
    ("drill", ["faults=0"], "faults=0", "be above 0"),
    ("drill", ["patience_seconds=0"], "patience_seconds=0.0", "be above 0"),
    ("drill", ["num_ranks=3"], "num_ranks=3", "be an even number"),
    ("drill", ["data=d"], "data=d", "come with tokenizer"),
    ("drill", ["run=."], "run=.", "be a folder of its own"),
    ("pretrain", ["checkpoint.resume=always"], "checkpoint.resume=always", "be auto or never"),
    ("pretrain", ["checkpoint.upload=''"], "checkpoint.upload=", "be a folder or an address other than run="),
    ("pretrain", ["run=runs/a", "checkpoint.upload=runs/a"], "checkpoint.upload=runs/a", "other than run=runs/a"),
    ("pretrain", ["evaluation.interval=-1"], "evaluation.interval=-1", "be at least 0"),
    ("pretrain", ["logging.interval=0"], "logging.interval=0", "be above 0"),
    ("pretrain", ["logging.peak_tflops=0"], "logging.peak_tflops=0.0", "be above 0"),
    # what megakor owns
    *[("pretrain", [f"+deepspeed.{name}=3"], f"deepspeed.{name}=3", f"megakor sets it from {ours}")
      for name, ours in OWNED_DEEPSPEED_KEYS.items()],
    ("pretrain", ["+deepspeed.zero_optimization.stage=2"], "deepspeed.zero_optimization.stage=2",
     "megakor sets it from parallel.zero_stage"),
    ("pretrain", ["+deepspeed.zero_optimization.compute_grad_norm=false"],
     "deepspeed.zero_optimization.compute_grad_norm=False", "steps whose norm is not finite are skipped"),
    ("pretrain", ["+deepspeed.pipeline.pipe_partitioned=true"], "deepspeed.pipeline.pipe_partitioned=True",
     "be left out"),
    ("pretrain", ["+deepspeed.pipeline.pipe_partitioned=false"], "deepspeed.pipeline.pipe_partitioned=False",
     "be left out"),
    ("pretrain", ["+deepspeed.pipeline.grad_partitioned=true"], "deepspeed.pipeline.grad_partitioned=True",
     "be left out"),
    # plan
    *[
        (verb, [f"cluster.gpus={gpus}"], f"cluster.gpus={gpus}", "be number x kind")
        for verb in ("plan", "plan search") for gpus in ("a100-80g", "0xa100-80g", "-1xh100", "8", "x", "8x")
    ],
    ("plan search", ["cluster.gpus=null"], "cluster.gpus=None", "be given"),
    *[
        ("plan", [f"cluster.{name}={value}"], f"cluster.{name}={value}.0", "be above 0")
        for name in ("price_krw", "krw_per_usd") for value in (0, -1)
    ],
    ("plan", ["cluster.ranks_per_node=0"], "cluster.ranks_per_node=0", "be above 0"),
    ("plan", ["lora.rank=-1"], "lora.rank=-1", "be at least 0"),
    ("plan", ["lora.alpha=0"], "lora.alpha=0.0", "be above 0"),
    ("plan", ["lora.targets=[]"], "lora.targets=[]", "name at least one linear, each once"),
    ("plan", ["lora.targets=[dense,dense]"], "lora.targets=['dense', 'dense']", "name at least one linear, each once"),
    ("plan", ["format=yaml"], "format=yaml", "be table or json"),
    ("plan search", ["num_rows=0"], "num_rows=0", "be above 0"),
    ("plan search", ["parallel.tensor_parallel_size=3"], "parallel.tensor_parallel_size=3", "nearest: 2 or 4"),
    # instruct
    ("instruct", ["train.sequence_lengths={100: 32}"], "train.sequence_lengths={100: 32}", "a pair stays whole"),
    ("instruct", ["pairs.validation_ratio=1"], "pairs.validation_ratio=1.0", "lie in [0, 1)"),
    ("instruct", ["pairs.validation_ratio=-0.1"], "pairs.validation_ratio=-0.1", "lie in [0, 1)"),
    ("instruct", ["pairs.max_pairs=0"], "pairs.max_pairs=0", "be above 0"),
    ("instruct", ["lora.rank=-1"], "lora.rank=-1", "be at least 0"),
    ("instruct", ["lora.alpha=0"], "lora.alpha=0.0", "be above 0"),
    ("instruct", ["lora.targets=[]"], "lora.targets=[]", "name at least one linear"),
    ("instruct", ["lora.targets=[dense,dense]"], "lora.targets=['dense', 'dense']", "linear, each once"),
    # corpus, tokenizer, shards
    ("corpus", ["heldout_ratio=0"], "heldout_ratio=0.0", "lie in (0, 1)"),
    ("corpus", ["heldout_ratio=1"], "heldout_ratio=1.0", "lie in (0, 1)"),
    ("corpus", ["max_bytes=0"], "max_bytes=0", "be above 0"),
    ("train-tokenizer", ["inputs=[]"], "inputs=[]", "name at least one file or glob"),
    ("train-tokenizer", ["vocab_size=0"], "vocab_size=0", "be above 0"),
    ("train-tokenizer", ["max_bytes=-5"], "max_bytes=-5", "be above 0"),
    ("train-tokenizer", ["num_threads=0"], "num_threads=0", "be above 0"),
    ("train-tokenizer", ["character_coverage=0"], "character_coverage=0.0", "lie in (0, 1]"),
    ("train-tokenizer", ["character_coverage=1.1"], "character_coverage=1.1", "lie in (0, 1]"),
    ("shard", ["inputs=[]"], "inputs=[]", "name at least one file or glob"),
    ("shard", ["shard_size=0"], "shard_size=0", "be above 0"),
    ("shard", ["num_workers=0"], "num_workers=0", "be above 0"),
    # the others
    ("import-config", ["path=[]"], "path=[]", "name at least one file"),
    ("import-config", ["world_size=0"], "world_size=0", "be above 0"),
    ("import-config", ["format=yaml"], "format=yaml", "be table or json"),
    ("evaluate", ["micro_batch_size=0"], "micro_batch_size=0", "be above 0"),
    ("generate", ["context=맥락"], "context=맥락", "come with a question"),
    ("generate", ["max_new_tokens=0"], "max_new_tokens=0", "be above 0"),
    ("generate", ["temperature=-1"], "temperature=-1.0", "be at least 0"),
    ("generate", ["num_samples=0"], "num_samples=0", "be above 0"),
    ("generate", ["top_p=0"], "top_p=0.0", "lie in (0, 1]"),
    ("generate", ["top_p=1.1"], "top_p=1.1", "lie in (0, 1]"),
    ("demo", ["pipeline_parallel_size=3"], "pipeline_parallel_size=3", "be 1 or 2"),
    *[("demo", [f"{name}=0"], f"{name}=0", "be above 0")
      for name in ("max_bytes", "vocab_size", "num_steps", "instruct_steps")],
    ("demo", ["run=."], "run=.", "be a folder of its own"),
    ("demo", ["run=.."], "run=..", "be a folder of its own"),
    ("demo", ["run=/"], "run=/", "be a folder of its own"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "arguments", "what", "rule"), BAD, ids=[" ".join(case[1]) for case in BAD])
def test_rules(verb: str, arguments: list[str], what: str, rule: str) -> None:
    with pytest.raises(ValueError, match=" must ") as raised:
        quickly_composed(verb, *NEEDED[verb], *arguments)
    line = str(raised.value)
    assert line.startswith(f"{what} must "), line
    assert rule in line


@pytest.mark.parametrize(("argument", "given"), [("question=뭐", "prompt and question"), ("prompt=null", "neither")])
def test_a_prompt_or_a_question(argument: str, given: str) -> None:
    with pytest.raises(ValueError, match=rf"either prompt= or question= must be given, not {given}$"):
        quickly_composed("generate", *NEEDED["generate"], argument)


def test_a_broken_rule_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        composed("pretrain", *NEEDED["pretrain"], "model.hidden_size=30")
    rule = "model.hidden_size=30 must be divisible by model.num_attention_heads=4"
    assert (ended.value.code, capsys.readouterr().err) == (1, f"megakor pretrain: error: {rule}\n")


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("pretrain", ["parallel.zero_stage=0", *FP32]),
        ("pretrain", ["parallel.zero_stage=2", "train.precision=bf16"]),
        ("pretrain", ["parallel.pipeline_parallel_size=2", "train.precision=fp16"]),
        ("pretrain", ["parallel.zero_stage=3", "parallel.offload_optimizer=true", "parallel.offload_parameters=true"]),
        ("pretrain", ["parallel.tensor_parallel_size=4", "parallel.sequence_parallel=true"]),
        ("pretrain", ["parallel.tensor_parallel_size=2", "parallel.context_parallel_size=2", "parallel.zero_stage=3"]),
        ("pretrain", ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]),
        ("pretrain", ["model.hidden_dropout=0.1", "train.activation_checkpointing=selective"]),
        ("pretrain", ["model.rotary_pct=1.0", "train.clip_grad_norm=0", "checkpoint.keep_last=0"]),
        ("pretrain", ["train.sequence_length=2048", "evaluation.interval=0", "optimizer.weight_decay=0"]),
        ("pretrain", ["parallel.pipeline_partition=type:Block"]),
        ("pretrain", ["+deepspeed.zero_optimization.overlap_comm=true", "+deepspeed.prescale_gradients=true"]),
        ("corpus", ["max_bytes=1"]),
        ("generate", ["prompt=null", "question=뭐", "context=맥락", "temperature=0", "top_p=1"]),
        ("demo", ["run=runs/다른"]),
        ("launch pretrain", ["cluster=deepspeed", "launch.elastic=true", "launch.restarts=9", "cluster.include=a:0"]),
        ("launch pretrain", ["launch.elastic=true", "launch.num_ranks=8", "cluster.environment.NCCL_DEBUG=INFO"]),
        ("launch instruct", ["cluster=slurm", "launch.restarts=9", "cluster.secrets=[WANDB_API_KEY,HF_TOKEN]"]),
    ],
)
def test_the_edges_that_are_allowed(verb: str, arguments: list[str]) -> None:
    quickly_composed(verb, *NEEDED[verb], *arguments)


def test_what_instruct_learns_from_its_base_is_checked_too() -> None:
    model = composed("pretrain", *NEEDED["pretrain"]).model
    config = composed("instruct", *NEEDED["instruct"], "train.sequence_length=4096")
    with pytest.raises(ValueError, match=r"train.sequence_length=4096 must be at most .*max_position_embeddings=2048"):
        check_fit(config, model)


def test_every_rule_is_broken_by_a_test() -> None:
    """Keys that a check names literally, all of which have a bad value above."""
    named: set[str] = set()
    source = "".join(map(inspect.getsource, (checks, cluster_checks, data_checks, verb_checks)))
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("require", "positive", "share")
        ):
            for argument in node.args:
                if (
                    isinstance(argument, ast.Constant)
                    and isinstance(argument.value, str)
                    and re.match(r"[a-z_., ]+$", argument.value)
                ) and ("." in argument.value or argument.value in known_plain()):
                    named.add(argument.value)
    broken = {what.partition("=")[0] for _, _, what, _ in BAD}
    assert len(named) > 20
    assert named <= broken, named - broken


def known_plain() -> set[str]:
    return {what.partition("=")[0] for _, _, what, _ in BAD} | {"heldout_ratio", "shard_size", "micro_batch_size"}


def test_a_configuration_without_rules_passes() -> None:
    check(composed("report", "run=r"))
