"""Responses of servers, built from probabilities."""

import json
import math


def log(probability):
    return math.log(probability) if probability else -9999.0


def token(text, probability, data=None):
    item = {"token": text, "logprob": log(probability)}
    return item if data is None else {**item, "bytes": list(data)}


def position(*alternatives, chosen=None, with_bytes=False):
    """A position whose first alternative is the token of the answer."""
    tokens = [
        token(text, p, text.encode() if with_bytes else None)
        for text, p in alternatives
    ]
    return {**(chosen or tokens[0]), "top_logprobs": tokens}


def chat(*positions, **message):
    choice = {"message": message, "logprobs": {"content": list(positions)}}
    return {"choices": [{"finish_reason": "stop", "index": 0, **choice}]}


def completion(text, *positions):
    """`positions`: `(token, probability, {token: probability})`."""
    logprobs = {
        "tokens": [token for token, _, _ in positions],
        "token_logprobs": [log(p) for _, p, _ in positions],
        "top_logprobs": [
            {key: log(p) for key, p in top.items()} for _, _, top in positions
        ],
    }
    return {"choices": [{"text": text, "logprobs": logprobs}]}


def batch(custom_id, body, status=200, error=None):
    response = {"status_code": status, "request_id": "r", "body": body}
    if body is None:
        response = None
    return {"custom_id": custom_id, "response": response, "error": error}


def write(path, *records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path
