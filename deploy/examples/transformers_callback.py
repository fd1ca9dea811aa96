"""Has Retain watch a `transformers.Trainer`: posts item scores at each evaluation and does what is decided.

    client = Retain("http://127.0.0.1:8000", key)
    run = {"model": "my-7b", "policy": {"benchmarks": [{"name": "general"}]},
           "levers": [{"type": "l2sp", "strength": 0.1}]}
    Trainer(..., callbacks=[RetainCallback(client, run, score, set_strength)])

`score(model)` gives {benchmark: {item id: score}}; `set_strength(name, value)` turns your own penalty.
Steps that a rollback takes back are not trained again beyond `max_steps`. With several processes, do this on
rank 0 and broadcast the instructions and the restored weights.
"""

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from transformers import TrainerCallback


class Retain:
    """The few calls that a trainer makes."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request; an error is a `urllib.error.HTTPError`."""
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1/{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


class RetainCallback(TrainerCallback):
    """Registers the run, posts scores, carries instructions out before the next step, and says so."""

    poll_steps = 10  # between evaluations, for what people order

    def __init__(self, client, run, score, set_strength):
        self.client, self.run, self.score, self.set_strength = client, run, score, set_strength
        self.path, self.cursor = "", ""
        self.branch = self.undone = 0  # rollbacks so far, and the steps that they took back
        self.scale = 1.0  # of the learning rate

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        """Registers the run with the scores of the model as it starts."""
        self.path = f"runs/{self.client.call('POST', 'runs', self.run)['id']}"
        for lever in self.run.get("levers", ()):
            self.set_strength(lever["type"], lever.get("strength", 0.0))
        self._save(self._directory(args, 0), model, optimizer)
        self.client.call("POST", f"{self.path}/baseline", {"scores": self._scores(model)})

    def on_evaluate(self, args, state, control, model=None, metrics=None, **rest):
        """Saves what may be gone back to, posts its scores, and carries out the decision."""
        step = state.global_step - self.undone
        if step < 1:
            return
        self._save(self._directory(args, step), model, rest["optimizer"])
        point = {"branch": self.branch, "step": step, "scores": self._scores(model)}
        loss = (metrics or {}).get("eval_loss")
        self.client.call("POST", f"{self.path}/evaluations", point | {"valid_loss": loss})
        self._obey(args, state, control, model, **rest)

    def on_step_end(self, args, state, control, **rest):
        """Hears of what people ordered meanwhile."""
        if state.global_step % self.poll_steps == 0:
            self._obey(args, state, control, **rest)

    def on_train_end(self, args, state, control, **_):
        """Ends the run."""
        self.client.call("POST", f"{self.path}/finish", {"status": "succeeded"})

    def _obey(self, args, state, control, model, optimizer, lr_scheduler, **_):
        after = f"?after={self.cursor}" if self.cursor else ""
        for decision in self.client.call("GET", f"{self.path}/decisions{after}")["data"]:
            self.cursor = decision["id"]
            for told in decision["instructions"]:
                match told["type"]:
                    case "set_strength":
                        self.set_strength(told["strategy"], told["strength"])
                    case "set_learning_rate":
                        self._scale(told["scale"], optimizer, lr_scheduler)
                    case "roll_back":
                        self._load(self._directory(args, told["step"]), model, optimizer)
                        self.branch = told["branch"]
                        self.undone = state.global_step - told["step"]
                    case "stop":
                        control.should_training_stop = True
            if decision["instructions"]:
                step = {"step": state.global_step - self.undone + 1}
                path = f"{self.path}/decisions/{decision['id']}/acknowledge"
                self.client.call("POST", path, step)

    def _scores(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        return [
            {"benchmark": name, "items": [{"id": key, "score": s} for key, s in items.items()]}
            for name, items in self.score(model).items()
        ]

    def _directory(self, args, step):
        return Path(args.output_dir) / f"retain-{step}"  # a later branch writes a step anew

    def _save(self, directory, model, optimizer):
        directory.mkdir(parents=True, exist_ok=True)
        save_model(model, str(directory / "model.safetensors"))
        torch.save(optimizer.state_dict(), directory / "optimizer.pt")

    def _load(self, directory, model, optimizer):
        load_model(model, str(directory / "model.safetensors"))
        optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))

    def _scale(self, scale, optimizer, scheduler):
        factor, self.scale = scale / self.scale, scale
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * factor
