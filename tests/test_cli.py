"""The command line without a cluster: configuration in layers, readable errors, what the terminal shows."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh import cli
from expertmesh.client import AnswerDelta, Finished, ReasoningDelta
from expertmesh.cluster.commands.console import TurnPrinter, status_table, summary_of, topology_as_dict
from expertmesh.cluster.commands.serve import serve_config
from expertmesh.config import ClusterConfig
from expertmesh.errors import ConfigError
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.request import FinishReason


def config_of(*flags: str, environ: dict[str, str] | None = None) -> ClusterConfig:
    return serve_config(cli.make_parser().parse_args(["serve", *flags]), environ or {})


def test_later_sources_win(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text("model: /from/file\nnum_expert_shards: 3\nscheduler: {max_num_seqs: 5, max_num_waiting: 6}\n")
    environ = {"EXPERTMESH_SCHEDULER__MAX_NUM_SEQS": "7", "EXPERTMESH_NUM_EXPERT_SHARDS": "4"}
    config = config_of("--config", str(file), "--shards", "8", "--set", "cache.block_size=32", environ=environ)
    assert (config.model, config.num_expert_shards, config.cache.block_size) == ("/from/file", 8, 32)
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_waiting) == (7, 6)


def test_a_json_file_is_read_too(tmp_path: Path):
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps({"layout": "colocated", "network": {"gateway_port": 0}}))
    config = config_of("--config", str(file), "--model", "m")
    assert (config.layout, config.network.gateway_port) == ("colocated", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--set", "nonsense"], "section.field=value"),
        (["serve", "--set", "scheduler.max_num_seq=3"], "a field of ClusterConfig"),
        (["serve", "--set", "scheduler.max_num_seqs=three"], "a int"),
        (["serve", "--config", "/nowhere.yaml"], "a readable JSON or YAML file"),
        (["serve", "--redis-url", "redis+sentinel://:secret@host:26379"], "the name of the primary is missing"),
        (["serve", "--model", "/nowhere"], "config.json"),
        (["make-checkpoint", "--config", "/nowhere.json", "--out", "x"], "a readable JSON or YAML file"),
        (["status", "--address", "127.0.0.1:1"], "Unavailable"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cli.os, "environ", {})
    assert cli.main(arguments) in (1, 2)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("expertmesh: ")
    assert message in err


def test_a_broken_yaml_file_names_the_place(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text("a: [1,\n")
    with pytest.raises(ConfigError, match="line 2"):
        config_of("--config", str(file))


def test_help_answers_without_loading_the_machinery():
    code = (
        "import sys; from expertmesh import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(str({'torch', 'ray', 'grpc', 'yaml'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("serve", "generate", "chat", "sessions", "status", "make-checkpoint"):
        assert command in done.stdout


def test_make_checkpoint_writes_what_its_json_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "config.json"
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "vocab_size": 64}
    small |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    config.write_text(json.dumps(small | {"intermediate_size": 32}))
    assert cli.main(["make-checkpoint", "--config", str(config), "--out", str(tmp_path / "made"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["num_files"] == 1
    assert (Path(made["folder"]) / "model.safetensors").stat().st_size > made["num_bytes"]


# ---- what the terminal shows

FINISHED = Finished(
    offset=9,
    reason=FinishReason.STOP,
    prompt_tokens=17,
    cached_tokens=16,
    completion_tokens=40,
    reasoning_tokens=30,
    committed=True,
    session_version=1,
    queue_s=0.0,
    time_to_first_token_s=0.05,
    time_to_first_answer_token_s=0.5,
    total_s=0.9,
    stop_matched="",
)


@pytest.mark.parametrize(("color", "shown"), [(True, "\x1b[2mhm\x1b[0mso\n"), (False, "<think>\nhm\n</think>\n\nso\n")])
def test_thinking_is_set_apart(color: bool, shown: str):
    out = io.StringIO()
    printer = TurnPrinter(out, color=color)
    for event in (ReasoningDelta(1, "h"), ReasoningDelta(2, "m"), AnswerDelta(3, "so"), FINISHED):
        printer.show(event)
    assert out.getvalue() == shown


def test_a_turn_is_summed_up_in_one_line():
    assert summary_of(FINISHED) == "17 in (16 cached), 40 out (30 thinking), first token 0.050 s, 0.90 s, stop"


def test_status_shows_members_and_numbers():
    attention = pb.MemberStatus(
        member_id="a#1",
        attention=True,
        state="ready",
        ep_rank=-1,
        num_running=2,
        num_kv_blocks=10,
        num_free_kv_blocks=7,
    )
    expert = pb.MemberStatus(
        member_id="e#1", expert=True, state="ready", num_physical_experts=8, num_rows=99, weight_bytes=2_500_000
    )
    topology = pb.Topology(model="m", epoch=2, layout="disaggregated", members=[attention, expert], gateways=["h:1"])
    lines = status_table(topology, {"h:1": "SERVING"}).splitlines()
    assert lines[0] == "m: 1 gateway, 1 attention, 1 expert shards, disaggregated, epoch 2, placement 0"
    assert lines[3].split()[:3] == ["a#1", "ready", "-"]
    assert "3/10" in lines[3]
    assert lines[4].split()[-5:] == ["99", "0", "%", "2.5", "MB"]
    values = json.loads(json.dumps(topology_as_dict(topology, {"h:1": "SERVING"})))
    assert (values["epoch"], values["members"][1]["num_rows"], values["health"]) == (2, 99, {"h:1": "SERVING"})


def test_serve_without_a_model_starts_on_the_demo_model():
    config = config_of()
    assert (Path(config.model) / "model.safetensors").is_file()
    assert config.served_model_name == "demo-moe"
