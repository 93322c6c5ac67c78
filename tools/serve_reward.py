"""Serve a reward over HTTP, so that its models live on another GPU or machine.

    python tools/serve_reward.py --reward geneval:strict,clip --port 8000
    python train.py --reward http:http://HOST:8000 ...

A request and its answer, as HttpReward of reward.py has them:
    {"images": ["base64 PNG", ...], "prompts": ["...", ...], "metadata": [{...}, ...] or null}
    {"scores": [1.5, null, ...]}                                            null: no score
"""
import argparse
import base64
import http.server
import io
import json
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reward import make_reward, needs_metadata  # noqa: E402
from shapes import world  # noqa: E402
from support import pictures, processes  # noqa: E402


def scores(reward, body) -> list:
    """Return the scores of a request, None where there is none."""
    images = torch.stack([pictures.read_picture(io.BytesIO(base64.b64decode(image)))
                          for image in body["images"]])
    values = reward(images, body["prompts"], body.get("metadata"))
    return [None if math.isnan(value) else value for value in values.tolist()]


def serve(reward, host, port):
    """Return a server; one request at a time, since a reward's models are shared."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                code, answer = 200, {"scores": scores(reward, json.loads(body))}
            except (Exception, SystemExit) as error:        # the client quotes it
                code, answer = 400, {"error": f"{type(error).__name__}: {error}"}
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
    return http.server.HTTPServer((host, port), Handler)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reward", required=True, help="see reward.py")
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines (%(default)s)")
    p.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    p.add_argument("--device", help="cpu, cuda ... (default: cuda where there is one)")
    p.add_argument("--shapes", action="store_true", help="geneval by the tiny world's detector")
    args = p.parse_args()
    _, _, device = processes.setup(args.device)
    detector = world.detect if args.shapes and needs_metadata(args.reward) else None
    reward = make_reward(args.reward, device=device, detector=detector)
    server = serve(reward, args.host, args.port)
    print(f"serving {reward.spec} at http://{args.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    processes.run(main)
