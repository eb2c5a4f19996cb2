"""A run that is killed at any moment and resumed, or retried, ends like one that never was: locally and on S3; damage is told.

Without a hook in the product: `killing/sitecustomize.py` kills tasks at named points, and the tests marked `long` at random moments.
"""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from stand_ins.pod import CREDENTIALS
from stand_ins.services import BUCKET, Aws

from a2d_core import embedded

ROOT = Path(__file__).resolve().parents[1]
FLOW = str(ROOT / "flows" / "a2d_flow.py")
MEASURED = ("seconds", "per_second", "memory_mb", "runtime")
POINTS = {
    "run begun, not recorded",
    "in training",
    "while saving",
    "between training and saving",
    "logged, not registered",
    "registered, without its alias",
}
MOMENTS = 20
RECIPE = """
base = "smoke"
[compute]
""" + "\n".join(f"{part} = {{ retries = 2, minutes_between_retries = 0 }}" for part in ("convert", "train", "generate", "register"))


class Place:
    """A directory in which the flow is run on a datastore, and what came of it."""

    def __init__(self, folder, **environment):
        self.folder, self.environment = folder, environment
        folder.mkdir()
        (folder / "killed.toml").write_text(RECIPE)
        (folder / "points").mkdir()

    def start(self, *arguments, config=True, **more):
        """Start the flow, in a process group of its own."""
        preset = ["--config-value", "preset", "killed.toml"] if config else []
        mine = {"METAFLOW_DATASTORE_SYSROOT_LOCAL": str(self.folder), "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, FLOW, *preset, *arguments, "--run-id-file", "run_id"],
            cwd=self.folder,
            env=os.environ | mine | self.environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *arguments, **more):
        """Run the flow to its end or its death; the exit code, and what it printed."""
        process = self.start(*arguments, **more)
        try:
            output, _ = process.communicate(timeout=600)
        finally:
            end(process)
        return process.returncode, output

    def resume(self, **more):
        return self.finish("resume", "--origin-run-id", self.run_id(), config=False, **more)

    def run_id(self):
        return (self.folder / "run_id").read_text()

    def armed(self, *points, everything=True):
        """The environment in which tasks die at these points, and the scheduler with them if it is `everything`."""
        for point in {"before registration", *POINTS} - {*points}:
            (self.folder / "points" / point).touch()
        paths = [str(ROOT / "tests" / "killing"), os.environ.get("PYTHONPATH", "")]
        return {"A2D_KILL": str(self.folder / "points"), "A2D_KILL_ALL": "1" if everything else "", "PYTHONPATH": os.pathsep.join(paths)}

    def query(self, text):
        with sqlite3.connect(f"file:{self.folder}/mlflow.db?mode=ro", uri=True) as database:
            return database.execute(text).fetchall()

    def outcome(self):
        """All that must not depend on what happened on the way: lists, in which what is there twice stands twice."""
        stages = dict(self.query("select run_uuid, value from tags where key = 'a2d.stage'"))
        metrics = self.query("select run_uuid, key, step, value from metrics")
        return {
            "runs": sorted((stages.get(run, "parent"), status) for run, status in self.query("select run_uuid, status from runs")),
            "metrics": sorted(
                (stages.get(run, "parent"), key, step, None if key.endswith(MEASURED) else value) for run, key, step, value in metrics
            ),
            "params": sorted((stages.get(run, "parent"), *rest) for run, *rest in self.query("select run_uuid, key, value from params")),
            "versions": self.query("select name, version from model_versions"),
            "weights": self.query("select value from model_version_tags where key = 'checkpoint_sha256'"),
            "aliases": self.query("select name, alias, version from registered_model_aliases"),
            "described": [bool(text) for (text,) in self.query("select description from model_versions")],
        }


def end(process):
    """SIGKILL to all that a run has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def s3():
    """The environment of a datastore on S3, as far as this machine can have one."""
    aws = Aws()
    yield on_s3(aws.url)
    aws.server.stop()


def on_s3(url):
    where = {"DEFAULT_DATASTORE": "s3", "DATASTORE_SYSROOT_S3": f"s3://{BUCKET}/metaflow", "S3_ENDPOINT_URL": url, "S3_WORKER_COUNT": "2"}
    return CREDENTIALS | {f"METAFLOW_{name}": value for name, value in where.items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What comes of a run that nothing happens to, and the seconds that it takes."""
    embedded.build_base("smoke")  # once a machine: it is no part of the time
    place = Place(tmp_path_factory.mktemp("straight") / "place")
    started = time.monotonic()
    code, output = place.finish("run")
    assert code == 0, output
    return place.outcome(), time.monotonic() - started


def environment_of(datastore, request):
    return request.getfixturevalue("s3") if datastore == "s3" else {}


def assert_like(place, straight):
    found, expected = place.outcome(), straight[0]
    for part in expected:
        assert found[part] == expected[part], part


@pytest.mark.parametrize("datastore", ["local", pytest.param("s3", marks=pytest.mark.long)])
def test_killed_at_each_named_point_and_resumed_it_ends_like_a_straight_run(datastore, straight, tmp_path, request):
    place = Place(tmp_path / "place", **environment_of(datastore, request))
    armed = place.armed(*POINTS)
    code, output = place.finish("run", **armed)
    outputs = [output]
    while code == -signal.SIGKILL:
        code, output = place.resume(**armed)
        outputs.append(output)
    assert code == 0, outputs
    assert len(outputs) == 1 + len(POINTS)
    assert sum("pretrain goes on from step 2" in output for output in outputs) == 1
    assert sum("goes on from step 4" in output for output in outputs) == 2
    assert_like(place, straight)


@pytest.mark.parametrize("datastore", ["local", pytest.param("s3", marks=pytest.mark.long)])
def test_a_step_that_dies_is_tried_again_without_a_person(datastore, straight, tmp_path, request):
    place = Place(tmp_path / "place", **environment_of(datastore, request))
    code, output = place.finish("run", **place.armed(*POINTS, everything=False))
    assert code == 0, output
    assert {path.name for path in (place.folder / "points").iterdir()} >= POINTS
    assert "pretrain goes on from step 2" in output and "sft goes on from step 4" in output
    assert_like(place, straight)


@pytest.mark.long
@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("datastore", ["local", "s3"])
def test_killed_at_a_random_moment_and_resumed_it_ends_like_a_straight_run(datastore, moment, straight, tmp_path, request):
    place = Place(tmp_path / "place", **environment_of(datastore, request))
    seconds = random.Random(f"{datastore} {moment}").uniform(0, straight[1])
    process = place.start("run")
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        output = process.communicate()[0]
        has_begun = "[" in output and "/start/1 (pid" in output
        code, more = place.resume() if has_begun else place.finish("run")
        output = f"{output}\n--- killed after {seconds:.1f} of {straight[1]:.1f} s ---\n{more}"
        assert code == 0, output
    print(output)
    assert_like(place, straight)


# --- damage, and datastores that refuse ---


def flipped(path):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def stored_weights(place, step, name):
    """The weights of what a step has stored under a name, the newest first."""
    found = [path for path in place.folder.rglob("model.safetensors") if step in path.parts and f".{name}." in path.parent.name]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def test_one_damaged_byte_is_named_and_neither_begun_anew_nor_registered(tmp_path):
    place = Place(tmp_path / "place")
    armed = place.armed("in training", "before registration")
    off = "sft.enabled=false sample.enabled=false evaluate.enabled=false"
    assert place.finish("run", "--overrides", off, **armed)[0] == -signal.SIGKILL
    origin = place.run_id()
    [weights] = stored_weights(place, "pretrain", "training")
    flipped(weights)
    code, output = place.resume(**armed)
    assert code == 1
    assert f"the stored directory '{weights.parent}' is damaged: model.safetensors is not what was written" in " ".join(output.split())
    assert "pretrain starts at step 0" not in output and "Traceback" not in output
    assert f"resume --origin-run-id {place.run_id()}" in output
    flipped(weights)
    (place.folder / "run_id").write_text(origin)
    code, output = place.resume(**armed)
    assert code == -signal.SIGKILL and "pretrain goes on from step 2" in output
    weights = stored_weights(place, "pretrain", "model")[0]
    flipped(weights)
    code, output = place.resume(**armed)
    assert code == 1
    assert f"'{weights.parent}' is damaged: model.safetensors is not what was written" in " ".join(output.split())
    assert place.query("select count(*) from model_versions") == [(0,)]


AS_A_TASK = """
import os, time
from pathlib import Path
from types import SimpleNamespace
from metaflow import current
run_id = str(time.time_ns())  # on S3 all tests have one bucket
current._set_env(SimpleNamespace(name="F", _graph_info={}), run_id=run_id, step_name="s", task_id="2", retry_count=0)
from a2d_core import store
from a2d_core.config import UserError
made = Path("made")
made.mkdir(exist_ok=True)
(made / "a.bin").write_bytes(bytes(200_000))
try:
"""


def as_a_task(folder, code, **environment):
    """What a task prints that runs this code."""
    program = AS_A_TASK + "".join(f"    {line}\n" for line in code.splitlines()) + "except UserError as error:\n    print(error)"
    mine = {"PYTHONPATH": str(ROOT), "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | mine | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TWO = """
for step in (1, 2):
    (made / "b.bin").write_bytes(bytes([step]) * 1000)
    store.put_dir(made, "training", step=step, score=None)
newest, older = (Path(found["url"]) for found in store.stored("training"))
def flip(path):
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
"""


def test_a_damaged_directory_is_passed_over_for_the_one_before(tmp_path):
    said = as_a_task(tmp_path, TWO + 'flip(newest / "b.bin")\nprint(store.restore("training", Path("there")))')
    assert "passed over: the stored directory '" in said
    assert said.endswith("is damaged: b.bin is not what was written\nthere/checkpoint-1\n")
    assert (tmp_path / "there" / "checkpoint-1" / "b.bin").read_bytes() == bytes([1]) * 1000


def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path):
    said = as_a_task(tmp_path, TWO + '(newest / "b.bin").unlink()\nflip(older / "b.bin")\nprint(store.restore("training", Path("there")))')
    assert "b.bin is missing; " in said and "There is no whole one to go on from" in said and "None" not in said
    assert not list((tmp_path / "there").iterdir())


FIT = """
import json, sys, time
sys.path.insert(0, FLOWS)
from a2d_flow import A2DFlow
from a2d_core import checkpoints, launch, presets
recipe = presets.resolve(presets.read("smoke"), "bd3lm")
SCORES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0, 6: 6.0}

def run(config, model, output, resume_from, **_):  # keep_checkpoints = 2: when it dies, the best is older than the newest two
    history = [{"step": step, "eval_nelbo": score} for step, score in SCORES.items()]
    for step in range(1 + int(str(resume_from or "-0").split("-")[-1]), 7):
        with checkpoints.whole(output / f"checkpoint-{step}") as room:
            (room / "trainer_state.json").write_text(json.dumps({"log_history": history[:step]}))
        (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in history[:step]))
        checkpoints.prune(output, 2, step, history[:step])
        while step not in stored:
            time.sleep(0.02)
        if step == 5:
            raise MemoryError("as planned")
    return {"steps": 6}

flow, stored, put_dir = SimpleNamespace(model=store.put_dir(made, "model")), set(), store.put_dir

def put(path, name, **metadata):
    put_dir(path, name, **metadata)
    stored.add(metadata["step"])

store.put_dir = put

class Log:
    add = lambda self, rows: None
    send = lambda self: 0

def fit(room, attempt):
    current._retry_count = attempt
    return A2DFlow._fit(flow, "sft", run, recipe, Path(room), launch.ONE_NODE, log=Log())[1].rows

for name in ("first", "second"):
    Path(name).mkdir()
follow = sys.modules["a2d_core.follow"]
follow.Follower.__init__.__kwdefaults__["interval"] = 0.02
try:
    fit("first", 0)
except MemoryError:
    print("kept", sorted(one["metadata"]["step"] for one in store.own("training")))
rows = fit("second", 1)
print("there", sorted(checkpoints.steps(Path("second/output"))), checkpoints.best(Path("second/output"), rows).name)
"""


@pytest.mark.parametrize("datastore", ["local", pytest.param("s3", marks=pytest.mark.long)])
def test_after_a_crash_the_best_checkpoint_is_there_again_though_newer_ones_have_followed(datastore, tmp_path, request):
    said = as_a_task(tmp_path, FIT.replace("FLOWS", repr(str(ROOT / "flows"))), **environment_of(datastore, request)).splitlines()
    assert said == ["sft starts at step 0", "kept [2, 4, 5]", "sft goes on from step 5", "there [2, 5, 6] checkpoint-2"]


PARTS = """
for step, score in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 0.0)):
    for node in (0, 1):
        if (node, step) == (1, 4):
            break  # node 1 has not stored its part yet
        folder = Path(f"of-{node}")
        folder.mkdir(exist_ok=True)
        for name in ("shared", f"own-{node}"):
            (folder / name).write_text(f"{node} at {step}")
        store.put_dir(folder, store.part("training", node), step=step, score=None if node else score)
store.prune("training", keep=1, nodes=2)
print([sorted(one["metadata"]["step"] for one in store.own(store.part("training", node))) for node in (0, 1)])
print(store.restore("training", Path("there"), nodes=2))
"""


@pytest.mark.parametrize("datastore", ["local", pytest.param("s3", marks=pytest.mark.long)])
def test_of_several_nodes_a_checkpoint_counts_once_all_have_stored_their_parts(datastore, tmp_path, request):
    assert as_a_task(tmp_path, PARTS, **environment_of(datastore, request)).splitlines() == ["[[1, 3, 4], [1, 3]]", "there/checkpoint-3"]
    for step in (1, 3):
        files = {path.name: path.read_text() for path in (tmp_path / "there" / f"checkpoint-{step}").iterdir()}
        assert files == {"shared": f"0 at {step}", "own-0": f"0 at {step}", "own-1": f"1 at {step}"}
    assert len(list((tmp_path / "there").iterdir())) == 2


def test_a_step_that_cannot_look_into_the_run_that_is_resumed_asks_for_a_metadata_service(tmp_path):
    said = as_a_task(tmp_path, 'current._origin_run_id = "9"\nprint(store.restore("training", Path("there")))')
    assert said.startswith("nothing is known here of run 9, which this one resumes: ") and "metadata service" in said


FULL = """
import resource, signal
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
"""
READ_ONLY = """
import errno, shutil
def refuse(source, target):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), target)
shutil.copy = refuse
"""


@pytest.mark.parametrize(("disk", "why"), [(FULL, "File too large"), (READ_ONLY, "Read-only file system")])
def test_a_disk_that_takes_no_more_is_told_with_the_file(disk, why, tmp_path):
    said = as_a_task(tmp_path, disk + 'store.put_dir(made, "model")')
    assert "the local datastore refuses to store 'made' as 'model' (OSError: " in said
    assert why in said and "/a.bin'" in said and "resume the run" in said


@pytest.fixture
def refusing():
    """An S3 that answers every request with a status, which the test sets."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>" if server.status == 403 else b""
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize(
    ("code", "what"), [('store.put_dir(made, "model")', "store 'made' as 'model'"), ('store.stored("training")', "look for 'training'")]
)
def test_an_s3_that_refuses_is_told_and_not_taken_for_an_empty_one(status, code, what, refusing, tmp_path):
    refusing.status = status
    hasty = {"RETRY_COUNT": "0", "TRANSIENT_RETRY_COUNT": "0", "CLIENT_RETRY_CONFIG": '{"max_attempts": 1, "mode": "standard"}'}
    environment = on_s3(f"http://127.0.0.1:{refusing.server_address[1]}") | {f"METAFLOW_S3_{name}": value for name, value in hasty.items()}
    said = as_a_task(tmp_path, code, **environment)
    assert f"the s3 datastore refuses to {what} (" in said and "resume the run" in said
