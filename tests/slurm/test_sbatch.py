"""What sbatch gets: a complete script, an environment that adds nothing, and names without a special meaning."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from configs.config import Config
from configs.errors import UserError
from configs.load import load
from configs.schema.slurm import SlurmSection
from configs.typed import list_items
from slurm.__main__ import main
from slurm.ask import ask, facts_of
from slurm.job import again
from slurm.look import queue
from slurm.submit.array import Override, configs_of, labels, overrides_of
from slurm.submit.request import not_heard, of_environment
from slurm.submit.submit import Submission
from tests.distributed import tiny, write_config
from tests.slurm.jobs import ROOT
from tests.slurm.stand_ins import commands, in_queue, verb
from trainer.host.inherited import without_job
from trainer.life.folder import RunFolder
from trainer.life.rows import read_json

SMALL = ("--nodes=2", "--gpus-per-node=2")
# Variables that Slurm sets in a job, and those that an outer `SBATCH_TIMELIMIT=10 sbatch ...` leaves there.
SURROUNDING = {
    **{
        "SLURM_JOB_ID": "12",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_MEM_PER_CPU": "7",
        "SBATCH_TIMELIMIT": "10",
    },
    **{"SLURM_MEM_PER_NODE": "70", "SLURMD_NODENAME": "node9", "CUDA_VISIBLE_DEVICES": "0", "PMI_RANK": "0"},
    **{"SLURM_RESTART_COUNT": "0", "SLURM_JOB_NUM_NODES": "2"},
}
PARTITION = "PartitionName=low Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=4\n"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, str]]:
    """Installs stand-ins of Slurm's commands; returns a function for the environment of the last sbatch call."""
    answers = {"scontrol": PARTITION, "sinfo": "low gpu:4", "squeue": "", "scancel": "", "sacct": ""}
    place = Path(commands(tmp_path / "bin", **answers)["PATH"])
    (place / "sbatch").write_text(f"#!/bin/sh\n/usr/bin/env > {tmp_path}/env\necho 55\n")
    (place / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(place))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return lambda: dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)


def surround(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SURROUNDING.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")


def given(environment: dict[str, str]) -> set[str]:
    return {name for name in environment if name.startswith(("SLURM", "SBATCH", "CUDA", "PMI"))}


def script(folder: Path, *words: str) -> str:
    done = verb(folder, "submit", str(write_config(folder)), *SMALL, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(folder: Path, *words: str, **changes: Any) -> str:
    """The one line of the refusal."""
    config = str(write_config(folder, **changes))
    done = verb(folder, "submit", config, *SMALL, "--dry-run", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert not (folder / "run").exists()
    return done.stderr


# ---- what is inherited -----------------------------------------------------------------------------------------------


def test_submit_inside_a_job_hands_nothing_of_it_on(
    told: Callable[[], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    surround(monkeypatch)
    assert main(["submit", str(write_config(tmp_path)), *SMALL]) == 0
    assert given(told()) == {"SLURM_CONF"}
    printed = capsys.readouterr()
    assert printed.out.startswith("job      55\n")
    assert printed.err == (
        "not handed on: SBATCH_TIMELIMIT (of job 12, in which this was typed); "
        "say it by flags, by slurm.sbatch or slurm.srun\n"
    )
    assert read_json(tmp_path / "run/slurm/job.json")["job"] == "55"
    assert "--time" not in (tmp_path / "run/slurm/55_submission.sh").read_text()


def test_a_chained_job_inherits_nothing_either(
    told: Callable[[], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surround(monkeypatch)
    job = again.Job("12", True, False, False, "low", 2, [])
    again.by_chain(job, ["node1"], RunFolder(tmp_path), print)
    assert given(told()) == {"SLURM_CONF"}


def test_what_a_person_likes_to_see_changes_no_answer(
    told: Callable[[], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SQUEUE_PARTITION", "SQUEUE_FORMAT", "SINFO_PARTITION", "SACCT_FORMAT", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "relative")
    ask("sbatch", SLURM_TIME_FORMAT="%s")
    commands_hear = {k: v for k, v in told().items() if k.startswith(("SLURM", "SQUEUE", "SINFO", "SACCT"))}
    assert commands_hear == {"SLURM_TIME_FORMAT": "%s"}


def test_outside_a_job_the_devices_are_the_persons() -> None:
    assert without_job({"CUDA_VISIBLE_DEVICES": "1", "SLURM_JWT": "x", "HOME": "/h", "SLURM_MPI_TYPE": "pmix"}) == {
        "CUDA_VISIBLE_DEVICES": "1",
        "SLURM_JWT": "x",
        "HOME": "/h",
    }


def test_the_cluster_that_a_person_named_is_asked(
    told: Callable[[], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a job it is the job's own cluster: the next life must stay there, wherever the first was submitted."""
    monkeypatch.setenv("SLURM_CLUSTERS", "gpu")
    assert not_heard(os.environ) is None
    assert main(["submit", str(write_config(tmp_path)), *SMALL]) == 0
    assert told()["SLURM_CLUSTERS"] == "gpu"
    surround(monkeypatch)
    again.by_chain(again.Job("12", True, False, False, "low", 2, []), ["node1"], RunFolder(tmp_path), print)
    assert "SLURM_CLUSTERS" not in told()


def test_a_persons_own_defaults_lie_below_all_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch itself would prefer them to the script, and so to what was typed."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name, value in (("ACCOUNT", "lab"), ("TIMELIMIT", "10"), ("QOS", "long"), ("WCKEY", "w")):
        monkeypatch.setenv(f"SBATCH_{name}", value)
    text = script(tmp_path, "--time=30", "slurm.qos=short")
    for line in ("--account=lab", "--time=30", "--qos=short"):
        assert f"#SBATCH {line}\n" in text
    line = not_heard(os.environ)
    assert line is not None
    assert line.startswith("not handed on: SBATCH_WCKEY (the job is as its script says)")
    assert of_environment({**os.environ, "SLURM_JOB_ID": "1"}) == {}
    monkeypatch.setenv("SBATCH_ACCOUNT", "two words")
    assert "error: the environment (SBATCH_...): account: " in refused(tmp_path)


# ---- characters with a meaning elsewhere -----------------------------------------------------------------------------


def test_a_percent_sign_is_one(tmp_path: Path) -> None:
    text = script(tmp_path, f"run.dir='{tmp_path}/50%sparse/%j'")
    assert f"#SBATCH --output={tmp_path}/50%%sparse/%%j/slurm/%j_0_log.out\n" in text.replace("'", "")
    several = script(tmp_path, f"run.dir='{tmp_path}/50%sparse'", "--array=run.seed=[1,2]")
    assert f"#SBATCH --output={tmp_path}/50%%sparse/slurm/%A_%a_0_log.out\n" in several.replace("'", "")
    line = in_queue("7", folder=Path("/data/50%%sparse"))
    assert queue._job(line.split("|", 8)).folder == Path("/data/50%sparse")


def test_a_backslash_stays_one(tmp_path: Path) -> None:
    """Slurm's reader of `#SBATCH` lines removes a backslash, even in quotes."""
    assert "#SBATCH --comment='a\\\\b'\n" in script(tmp_path, "--comment=a\\b")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--comment=a\n#SBATCH --mem=1",), "slurm.comment: 'a\\n#SBATCH --mem=1' has a line break"),
        (('run.name="a\\nb"', "run.dir=RUN"), "run.name: 'a\\nb' has a line break"),
        (('run.dir="RUN\\rb"',), "run.dir: "),
        (('slurm.sbatch={nice: "1\\n2"}',), "slurm.sbatch: nice: 'nice=1\\n2' has a line break"),
        (("run.dir='RUN\\b'",), "Slurm takes no backslash in the path of an output"),
        (("run.dir='RUN:b'",), "PYTHONPATH takes no colon: another path, or --no-snapshot"),
    ],
)
def test_what_a_script_cannot_hold_is_refused(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    told = refused(tmp_path, *(word.replace("RUN", f"{tmp_path}/run") for word in words))
    assert line in told
    assert len(told.splitlines()) == 1


def test_quotes_blanks_and_a_hash_are_a_name(tmp_path: Path) -> None:
    text = script(tmp_path, """run.name='two  "words" #3'""", f"run.dir={tmp_path}/run", "--comment=it's; $HOME")
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert ['--job-name=two  "words" #3'] in options
    assert ["--comment=it's; $HOME"] in options
    assert subprocess.run(["sh", "-n"], input=text, text=True, check=False).returncode == 0


def test_what_a_person_wrote_is_no_fact_of_a_job() -> None:
    name, comment = "x JobState=FAILED", "a Restarts=9 Reason=TimeLimit"
    line = f"JobId=7 JobName={name} UserId=me(1) JobState=RUNNING Reason=None Restarts=0 Comment={comment} StdOut=/x"
    facts = facts_of(line)
    assert [facts[key] for key in ("JobId", "JobState", "Restarts", "Reason")] == ["7", "RUNNING", "0", "None"]
    assert facts_of("PartitionName=low State=UP") == {"PartitionName": "low", "State": "UP"}


@pytest.mark.parametrize("elsewhere", [{"container": "img"}, {"python": "/env/bin/python"}])
def test_what_is_installed_here_says_nothing_of_a_container_or_another_python(
    elsewhere: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing_installed)
    wanted = {"run__wandb": "lab", "run__tensorboard": True, "parallel__engine": "zero"}
    config = Config.model_validate(tiny(tmp_path, **wanted))
    here = Submission(config, SlurmSection(gpus_per_node=1)).problems(paths=True)
    assert [problem.text.partition(" needs ")[0] for problem in here] == ["parallel.engine=zero", "run.tensorboard"]
    assert Submission(config, SlurmSection(gpus_per_node=1, **elsewhere)).problems(paths=True) == []


# ---- limits of names -------------------------------------------------------------------------------------------------


def labels_of(runs: list[list[str]]) -> list[str]:
    return labels([[Override(text, text) for text in own] for own in runs])


@pytest.mark.parametrize(
    ("items", "names"),
    [
        ('["a b.json","c.json"]', ["a_b.json", "c.json"]),
        ("[0.10,1.0e-3,1e-3,.5,0x10]", ["0.1", "0.001", "1e-3", "0.5", "16"]),
        ("[[0.9,0.95]]", ["_0.9,_0.95_"]),
        ("[True,null,'null']", ["true", "null", "null"]),
        ("[010,on,1_0,1:30,2024-01-02]", ["010", "on", "1_0", "1_30", "2024-01-02"]),  # YAML 1.1 read others
    ],
)
def test_an_array_that_is_submitted_again_finds_its_folders(items: str, names: list[str]) -> None:
    """The folders of an older version, whose names hold what YAML made of an item."""
    runs = overrides_of([f"a.b={items}"])
    assert [own.typed for (own,) in runs] == [f"a.b={item}" for item in list_items(items)]
    assert [re.sub(r"(?<=null)-\w{12}$", "", label) for label in labels(runs)] == [f"a.b={name}" for name in names]


def test_labels_are_shortened_and_stay_apart() -> None:
    many = [f"optim.lr=1e-{n}" for n in range(30)]
    long = [[*many, "run.seed=1"], [*many, "run.seed=2"], ["run.seed=3"], ["run.name=" + "ä" * 200]]
    short = labels_of(long)
    assert max(len(label.encode()) for label in short) <= 200
    assert len(set(short)) == 4
    assert short[2] == "run.seed=3"
    assert short[0].startswith("optim.lr=1e-0,optim.lr=1e-1,")
    assert labels_of(long[::-1]) == short[::-1]  # the same run has the same name in another array
    alike = labels_of([["run.name=a b"], ["run.name=a_b"], ["run.name=c d"]])
    assert len(set(alike)) == 3
    assert alike[2] == "run.name=c_d"
    assert all(label.startswith("run.name=a_b-") for label in alike[:2])
    with pytest.raises(UserError, match=r"two runs would both be run\.seed=1"):
        labels_of([["run.seed=1"], ["run.seed=1"]])


def test_many_overrides_in_a_line_make_a_folder(tmp_path: Path) -> None:
    lines = [" ".join([*(f"model.{key}=0.02" for key in ("init_std",) * 30), f"run.seed={n}"]) for n in (1, 2)]
    (tmp_path / "runs.txt").write_text("\n".join(lines))
    text = script(tmp_path, f"--array={tmp_path}/runs.txt")
    assert "#SBATCH --array=0-1%2\n" in text


@pytest.mark.parametrize("more", [(), ("--array=run.seed=[1,2]",)])
def test_too_long_a_path_is_told_in_a_dry_run(more: tuple[str, ...], tmp_path: Path) -> None:
    told = refused(tmp_path, f"run.dir={tmp_path}/{'x' * 300}", *more)
    assert "has 300 bytes, 255 are the most: shorten it" in told
    assert len(told.splitlines()) == 1
    told = refused(tmp_path, f"run.dir={tmp_path}{'/xxxxxxxxx' * 400}", *more)
    assert "bytes, 3895 are the most: shorten it" in told


def test_a_folder_that_a_label_makes_too_long_is_told(tmp_path: Path) -> None:
    room = 3890 - len(str(tmp_path))
    folder = f"{tmp_path}{('/' + 'x' * 9) * (room // 10)}"
    assert script(tmp_path, f"run.dir={folder}")
    told = refused(tmp_path, f"run.dir={folder}", "--array=run.seed=[1000000,2000000]")
    assert told.startswith("error: 2 mistakes:\nrun.dir: ")
    assert told.count("bytes, 3895 are the most: shorten it") == 2


# ---- before the queue ------------------------------------------------------------------------------------------------


def test_what_can_be_seen_from_here_is_refused_here(tmp_path: Path) -> None:
    words = (f"data.sources.0.path={tmp_path}/gone", f"data.tokenizer={tmp_path}/no.json", "start.from=/gone")
    told = refused(tmp_path, *words, "freeze.frozen=[block.*]", "--time=1")
    for line in (
        "time 1: the warning",
        "'block.*' matches no parameter",
        "no.json",
        "gone does not exist",
        "/gone does",
    ):
        assert line in told
    assert told.startswith("error: 5 mistakes:\n")
    assert told.endswith("where only the nodes see such a path: --no-check-data, and the job looks\n")
    assert len(script(tmp_path, *words, "--no-check-data")) > 0
    assert "matches no parameter" in refused(tmp_path, "freeze.frozen=[block.*]", "--no-check-data")


def test_runs_of_an_array_that_share_a_mistake_say_it_once(tmp_path: Path) -> None:
    told = refused(tmp_path, "data.tokenizer=/gone.json", "--array=run.seed=[1,2,3]")
    assert told.count("/gone.json") == 1
    told = refused(tmp_path, "--array=data.tokenizer=[/gone.json,/lost.json]")
    assert told.startswith("error: 2 mistakes:\n")


def test_no_torch_for_a_config_that_freezes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from slurm.submit.submit import Submission; from configs.load import load\n"
        "config = load(sys.argv[1], []); job = Submission(config, config.slurm)\n"
        "assert job.problems(paths=True) == []; assert 'torch' not in sys.modules"
    )
    config = write_config(tmp_path, slurm={"gpus_per_node": 1})
    assert load(str(config), []).slurm.gpus_per_node == 1
    done = subprocess.run([sys.executable, "-c", code, str(config)], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_user_id_without_a_name_and_without_home(tmp_path: Path, may_mount: None) -> None:
    """As in a container, where no user has a name."""
    config = write_config(tmp_path)
    bare = ["env", "-i", f"PATH={Path(sys.executable).parent}:/usr/bin:/bin"]
    words = [*bare, sys.executable, "-m", "slurm", "submit", str(config), *SMALL, "--dry-run"]
    code = "from slurm.submit.submit import _user; print('user', _user())"
    nobody = [f"mount --bind /dev/null {file}" for file in ("/etc/passwd", "/etc/nsswitch.conf")]  # systemd knows root
    inner = " && ".join([*nobody, shlex.join(words), shlex.join([*bare, sys.executable, "-c", code])])
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inner], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^#SBATCH --nodes=2$", done.stdout, re.M)
    assert done.stdout.splitlines()[-1] == f"user {os.getuid()}"


def test_the_folder_of_an_array_is_read_once(tmp_path: Path) -> None:
    """A folder's name is not read as YAML again."""
    folder = f"{tmp_path}/it's #3: [a]"
    base = load(str(write_config(tmp_path)), [f"run.dir={folder}"])
    found = configs_of(base, ["run.seed=[1,2]"], str(tmp_path / "config.yaml"), [])
    assert [config.run_dir for config in found] == [f"{folder}/run.seed=1", f"{folder}/run.seed=2"]
