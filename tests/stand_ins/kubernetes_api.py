"""A Kubernetes cluster's stand-in: an API server that accepts what the schema allows, and runs the container of each Job as a process.

There is no scheduler: node selectors, tolerations, resources and the image are checked and kept, and change nothing.
"""

import datetime
import json
import re
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

from stand_ins.pod import Pod

FIELDS = {"metadata.namespace": "default", "spec.serviceAccountName": "default", "status.hostIP": "127.0.0.1"}
"""What the downward API says of every pod."""


class Kubernetes:
    """The cluster: `jobs` in the order of their creation, `secrets` by name, and `kubeconfig` to reach it with."""

    def __init__(self, folder: Path, secrets: dict[str, dict[str, str]]):
        self.folder, self.secrets = folder, secrets
        self.jobs: dict[str, dict] = {}
        self.pods: dict[str, dict] = {}
        self.running: dict[str, Pod] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"cluster": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.kubeconfig = folder / "kubeconfig"
        cluster = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{self.server.server_port}"}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        users = [{"name": "me", "user": {}}]
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
        self.kubeconfig.write_text(json.dumps(config | {"clusters": [cluster], "contexts": [context], "users": users}))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for pod in self.running.values():
            pod.kill_group()

    def of_step(self, step: str) -> list[dict]:
        """The Jobs of a step, one for each attempt."""
        return [job for job in list(self.jobs.values()) if container(job)["name"] == step]

    def pods_of(self, step: str) -> list[Pod]:
        return [self.running[job["metadata"]["name"]] for job in self.of_step(step)]

    def create(self, job: dict) -> dict:
        """Take a Job and start its container; raises kubernetes_validate's error where the schema forbids it."""
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
        meta = job["metadata"]
        name = meta["name"] = meta.get("name") or meta["generateName"] + uuid.uuid4().hex[:5]
        meta["uid"] = uuid.uuid4().hex
        job["spec"].setdefault("parallelism", 1)
        job["status"] = {"active": 1}
        status = {"name": name, "image": "", "imageID": "", "ready": True, "restartCount": 0, "state": {"running": {"startedAt": now()}}}
        self.pods[name] = {
            "metadata": {"name": f"{name}-0", "uid": uuid.uuid4().hex, "labels": {"job-name": name}},
            "spec": job["spec"]["template"]["spec"],
            "status": {"phase": "Running", "startTime": now(), "containerStatuses": [status]},
        }
        self.running[name] = Pod(container(job)["command"], self.environment(job), self.folder)
        self.jobs[name] = job
        threading.Thread(target=self.follow, args=(name,), daemon=True).start()
        return job

    def environment(self, job: dict) -> dict[str, str]:
        """The variables of the container: its secrets', its own, and those that the downward API fills in."""
        meta = self.pods[job["metadata"]["name"]]["metadata"]
        known = FIELDS | {"metadata.name": meta["name"], "metadata.uid": meta["uid"]}
        found: dict[str, str] = {}
        for source in container(job).get("envFrom", []):
            found |= self.secrets[source["secretRef"]["name"]]
        for variable in container(job).get("env", []):
            field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            found[variable["name"]] = known[field] if field else variable.get("value", "")
        return found

    def follow(self, name: str) -> None:
        """Wait for a container, and write its end into the pod and the Job."""
        code = self.running[name].wait()
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "startedAt": now(), "finishedAt": now()}
        status = self.pods[name]["status"]
        status["containerStatuses"][0]["state"] = {"terminated": ended}
        status["phase"] = "Failed" if code else "Succeeded"
        self.jobs[name]["status"] = {"failed": 1} if code else {"succeeded": 1}


class Handler(BaseHTTPRequestHandler):
    """The requests that Metaflow makes of the API."""

    cluster: Kubernetes

    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            self.answer(self.cluster.create(job), 201)
        except kubernetes_validate.ValidationError as error:
            self.answer({"kind": "Status", "message": str(error)}, 422)
        except KeyError as error:
            self.answer({"kind": "Status", "message": f"there is no {error}"}, 422)

    def do_GET(self):
        path = urlsplit(self.path)
        job = self.cluster.jobs.get(path.path.rpartition("/jobs/")[2])
        if re.search(r"/jobs/[^/]+$", path.path):
            return self.answer(job or {"kind": "Status", "message": "there is no such Job"}, 200 if job else 404)
        if path.path.endswith("/pods"):
            name = parse_qs(path.query)["labelSelector"][0].removeprefix("job-name=")
            pods = [self.cluster.pods[name]] if name in self.cluster.pods else []
            return self.answer({"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": pods})
        return self.answer({"kind": "Status", "message": f"not served here: {self.path}"}, 404)

    def do_PATCH(self):
        """Metaflow takes a run's Job down by this when the run is interrupted."""
        name = urlsplit(self.path).path.rpartition("/")[2]
        self.rfile.read(int(self.headers["Content-Length"]))
        self.cluster.running[name].kill()
        self.answer(self.cluster.jobs[name])

    def answer(self, content: dict, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def container(job: dict) -> dict:
    """The one container of a Job."""
    return job["spec"]["template"]["spec"]["containers"][0]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
