"""The profiles: read by Snakemake's own parser, shown in dry runs, and those that can run here run."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from workflow_run import PROJECT, Hold, WorkflowRun, demo_folder, wait_until

PROFILES = sorted(path.parent for path in (PROJECT / "profiles").glob("*/config.yaml"))
OTHERS = [profile for profile in PROFILES if profile.name != "default"]
LOCAL_BATCH = PROJECT / "tests" / "support" / "local_batch.sh"


def content(profile: Path) -> dict:
    return yaml.safe_load((profile / "config.yaml").read_text())


def snakemake(*arguments: str, folder: Path, timeout: float = 240, **environment: str) -> str:
    """Runs Snakemake in a folder that looks like a clone, expects success, and returns what it printed."""
    ran = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.mark.parametrize("profile", OTHERS, ids=lambda profile: profile.name)
def test_snakemake_reads_every_profile_and_its_executor_takes_the_settings(profile):
    # Here alone: every process of tests reads this file, and Snakemake with its plugins takes its time.
    from snakemake.cli import parse_args
    from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

    _, read = parse_args(["--profile", str(profile)])
    written = content(profile)
    assert read.executor == written.get("executor")
    if read.executor is None:
        return
    settings = ExecutorPluginRegistry().get_plugin(read.executor).get_settings(read)
    prefix = f"{read.executor}-"
    own = {key.removeprefix(prefix).replace("-", "_") for key in written if key.startswith(prefix)}
    assert own
    for name in own:
        assert getattr(settings, name)


@pytest.mark.parametrize("profile", OTHERS, ids=lambda profile: profile.name)
def test_no_key_of_a_profile_is_overridden_by_the_default_one(profile):
    default = content(PROJECT / "profiles" / "default")
    assert "resources" not in default
    assert default.keys().isdisjoint(content(profile).keys())


def keys(profile: Path) -> set[str]:
    """Every key of a profile, those inside blocks too; `embed` is a rule, not a key."""
    found = set()
    for key, value in content(profile).items():
        found.add(key)
        if isinstance(value, dict):
            found |= value.keys()
            found |= {inner for block in value.values() if isinstance(block, dict) for inner in block}
    return found - {"embed"}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_every_key_of_a_profile_is_explained_in_its_section(profile):
    text = (PROJECT / "profiles" / "README.md").read_text()
    section = text.partition(f"\n## {profile.name}\n")[2].partition("\n## ")[0]
    missing = {key for key in keys(profile) if not re.search(rf"`[^`]*\b{re.escape(key)}\b[^`]*`", section)}
    assert not missing


@pytest.fixture
def own_clone(tmp_path, made_up_model):
    """A folder like a clone, with a workflow of its own that may be changed, and one input file of more than 1 MB."""
    run = WorkflowRun(tmp_path, made_up_model, samples="*.faa", groups=3, cpu_slots=3)
    sequences = ["MKVLAAGIVGAC" * 20, "MSTNPKPQRKTK" * 20, "MGLSDGEWQLVL" * 20]
    (tmp_path / "many.faa").write_text("".join(f">p{n}\n{sequences[n % 3]}\n" for n in range(5000)))
    assert (tmp_path / "many.faa").stat().st_size > 1_000_000
    shutil.copytree(PROJECT / "workflow", tmp_path / "workflow")
    shutil.copy(PROJECT / "environment.yml", tmp_path)
    (tmp_path / "profiles").symlink_to(PROJECT / "profiles")
    return run


def test_the_workstation_profile_limits_gpus_and_runs_nothing_again_for_a_touched_file(own_clone):
    run, profile = own_clone, ["--profile", "profiles/workstation"]
    snakemake(*profile, folder=run.folder)
    busy = sorted((worker["leased"], worker["released"]) for group in run.groups() for worker in group["workers"])
    # Three slots and at least three groups, but the profile says one GPU: one after the other.
    assert len(busy) == 3
    assert all(end <= start for (_, end), (start, _) in pairwise(busy))
    (run.folder / "many.faa").touch()
    (run.folder / "workflow" / "scripts" / "embed.py").touch()
    assert "Nothing to be done" in snakemake(*profile, "--dry-run", folder=run.folder)
    with open(run.folder / "many.faa", "a") as handle:
        handle.write(">new\nMKVLAAG\n")
    assert "plan" in snakemake(*profile, "--dry-run", "--quiet", "reason", folder=run.folder)


def test_with_the_generic_profile_a_killed_job_is_noticed_and_tried_again(quick_run, tmp_path):
    run = quick_run(40, groups=1, shard_residues=800)
    batch = tmp_path / "batch"
    batch.mkdir()
    (run.folder / "profiles").symlink_to(PROJECT / "profiles")
    command = f"sh {LOCAL_BATCH} {batch}"
    hold = Hold(run.folder)
    asked = "'{resources.gpu} {threads} {resources.mem_mb} {resources.runtime}'"
    process = run.start(
        "--profile", "profiles/cluster-generic", "--latency-wait", "5", "--seconds-between-status-checks", "1",
        "--cluster-generic-submit-cmd", f"{command} submit {asked}",
        "--cluster-generic-status-cmd", f"{command} status",
        "--cluster-generic-cancel-cmd", f"{command} cancel",
        environment=hold.environment,
    )  # fmt: skip
    try:
        wait_until(hold.held, 120, "a worker with a shard in hand")
        (first,) = batch.glob("job.*")
        subprocess.run(["sh", LOCAL_BATCH, batch, "cancel", first.name], check=True)
        hold.release()
        assert process.wait(240) == 0, (run.folder / "snakemake.out").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    jobs = list(batch.glob("job.*"))
    assert len(jobs) == 2
    gpu, threads, memory, minutes = (first / "asked").read_text().split()
    assert (gpu, threads) == ("1", "1")
    # What the rule estimates for this group, and not the profile's figures for jobs without an estimate.
    defaults = content(PROJECT / "profiles" / "cluster-generic")["default-resources"]
    assert 0 < int(memory) < defaults["mem_mb"]
    assert 10 <= int(minutes) < defaults["runtime"]
    (group,) = run.groups()
    assert group["attempt"] == 2
    assert len(group["segments_reused"]) >= 2
    assert run.summary()["embedded"] == 40


# What `qstat -x -f` of PBS Pro prints, shortened.
QSTAT = """Job Id: 1234.server
    Job_Name = esmflow.embed
    job_state = {state}
    queue = gpu
{exit_status}    Submit_arguments = -N esmflow.embed
"""


@pytest.mark.parametrize(
    ("state", "exit_status", "expected"),
    [("Q", "", "running"), ("R", "", "running"), ("H", "", "running"), ("F", "0", "success"), ("F", "1", "failed"),
     ("F", "271", "failed"), ("F", "", "failed"), (None, "", "running")],
)  # fmt: skip
def test_the_status_of_a_pbs_job_is_read_from_qstat(tmp_path, state, exit_status, expected):
    shown = QSTAT.format(state=state, exit_status=f"    Exit_status = {exit_status}\n" if exit_status else "")
    (tmp_path / "shown").write_text(shown)
    qstat = tmp_path / "qstat"
    qstat.write_text("#!/bin/sh\nexit 1\n" if state is None else f"#!/bin/sh\ncat {tmp_path}/shown\n")
    qstat.chmod(0o755)
    script = PROJECT / "profiles" / "cluster-generic" / "pbs_status.sh"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(["sh", script, "1234.server"], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [expected]


@contextmanager
def bucket(folder: Path):
    """Serves a folder as far as a dry run asks an S3 service: which buckets and objects are there, and how big."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            place = Path(self.translate_path(self.path))
            prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
            names = {str(path.relative_to(place)): path.stat() for path in place.rglob("*") if path.is_file()}
            keys = "".join(
                f"<Contents><Key>{name}</Key><Size>{stat.st_size}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for name, stat in names.items()
                if name.startswith(prefix)
            )
            answer = f"<ListBucketResult>{keys}<IsTruncated>false</IsTruncated></ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_HEAD(self):
            if Path(self.translate_path(self.path)).is_dir():
                self.send_response(200)
                self.end_headers()
            else:
                super().do_HEAD()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("name", ["kubernetes", "aws-batch"])
def test_a_dry_run_of_a_cloud_profile_shows_every_job_and_keeps_the_files_in_the_bucket(tmp_path, name):
    folder = demo_folder(tmp_path)
    prefix = content(PROJECT / "profiles" / name)["default-storage-prefix"]
    shutil.copytree(PROJECT / "resources" / "demo", tmp_path / "s3" / prefix.removeprefix("s3://") / "resources/demo")
    keys = {"SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "none", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "none"}
    with bucket(tmp_path / "s3") as url:
        shown = snakemake(
            "--profile", f"profiles/{name}", "--dry-run", "--storage-s3-endpoint-url", url,
            "--configfile", "config/demo/config.yaml", folder=folder, timeout=120, **keys,
        )  # fmt: skip
    assert "embed          4" in shown, shown
    assert f"{prefix}/results/demo/embed/group-3/run.json (send to storage)" in shown
    assert f"{prefix}/results/demo/model/checkpoint.safetensors (retrieve from storage)" in shown
    embed = shown.partition("rule embed:")[2].partition("resources:")[2].partition("\n")[0]
    assert " gpu=1" in embed


@pytest.mark.parametrize("name", ["kubernetes", "aws-batch"])
def test_without_a_bucket_a_cloud_profile_shows_its_jobs(tmp_path, name):
    keys = {"SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "none", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "none"}
    words = "--dry-run --executor dryrun --default-storage-provider none --configfile config/demo/config.yaml"
    shown = snakemake("--profile", f"profiles/{name}", *words.split(), folder=demo_folder(tmp_path), **keys)
    assert "embed          4" in shown, shown
