"""The model card of an export, as the hub reads it, and uploads to a hub on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import yaml

from jaxtrain.hub import HubError, upload
from jaxtrain.session.model_card import model_card


def run_folder(folder, config):
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": 1, "loss": 3.0, "entropy": 1.0},
        {"step": 2, "eval_loss": 2.5, "eval_loss_std_error": 0.25},
        {"step": 3, "loss": 2.0},
        {"step": 4, "loss": 1.0, "eval_loss": 1.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_metadata_the_data_and_the_metrics_of_the_step(tmp_path):
    source = {"path": "hf:openai/gsm8k@main", "split": "train"}
    config = {
        "recipe": "sft",
        "run": {"dir": "/home/somebody/runs/gsm8k"},
        "model": {"path": "Qwen/Qwen3-0.6B@abc", "chat_template": "/home/somebody/qwen.jinja"},
        "data": {"train": [source, {"path": "/home/somebody/chats.jsonl"}], "eval": source},
    }
    text = model_card(run_folder(tmp_path, config), 3, adapter=False)
    card = huggingface_hub.ModelCard(text)
    assert card.data.base_model == "Qwen/Qwen3-0.6B" and card.data.datasets == ["openai/gsm8k"]
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert "| loss | 2.0000 | 3 |" in text and "| eval_loss | 2.5000 ± 0.2500 | 2 |" in text and "entropy" not in text
    assert "# gsm8k\n" in text and "- train: chats.jsonl" in text and "somebody" not in text
    assert yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["data"]["eval"] == source


def test_the_base_of_a_folder_is_no_name_on_the_hub(tmp_path):
    config = {"recipe": "reward", "model": {"path": str(tmp_path)}, "data": {"train": {"path": "pairs.jsonl"}}}
    card = huggingface_hub.ModelCard(model_card(run_folder(tmp_path, config), 4, adapter=True))
    assert card.data.base_model is None and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification" and card.data.tags == ["jaxtrain", "reward"]


class Hub(BaseHTTPRequestHandler):
    """Accepts the commits of one user and keeps their files."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer(200, {"url": self.server.address + "/me/model"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": self.server.address + "/me/model/commit/1", "commitOid": "1"})
        return self.answer(200, {"errors": [], "warnings": []})  # of the card's metadata

    def answer(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_folder_is_uploaded_or_the_refusal_named(hub, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# Model\n")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(HubError, match=r"me/model could not be uploaded .*`hf auth login`"):
        upload(tmp_path, "me/model", private=True, message="m")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert upload(tmp_path, "me/model", private=True, message="m") == f"{hub.address}/me/model"
    assert hub.created["visibility"] == "private"
    assert hub.files == {"README.md": b"# Model\n", "model.safetensors": bytes(range(256))}


@pytest.mark.parametrize("name", ["model", "me/model@main", "me/"])
def test_a_name_that_cannot_be_uploaded_to(name, tmp_path):
    with pytest.raises(HubError, match=r"without a revision|not a name on the hub"):
        upload(tmp_path, name, private=False, message="m")
