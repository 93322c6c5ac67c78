"""Prompt files of all forms -> examples: {"prompt": ..., and what else the file has of it}."""
import csv
import io
import json
import re
import sys
from pathlib import Path

from support.weights import local

KEYS = ("prompt", "prompts", "caption", "text")


def natural(name):
    """Return a key that sorts 2 before 10."""
    return [part.zfill(20) for part in re.split(r"(\d+)", name)]


def read_prompts(path) -> list[dict]:
    """Return the examples of a file: .txt, a prompt a line; .jsonl, an object or a text a line;
    .json, a list of them, or an object that holds them; .csv or .tsv with a header; or of a folder
    with a .txt for each prompt, whose names the examples keep as "name".

    The prompt of an object or a row is the first of KEYS that it has, in any case; FILE:KEY names
    another, or the list inside a .json. Optional: "reward_prompt", what the reward is told instead,
    and GenEval's metadata; the rest stays with the example."""
    file, _, key = str(path).rpartition(":")
    if not local(file).is_file():
        file, key = str(path), ""
    kind = Path(file).suffix.lower()
    try:
        if local(file).is_dir():
            files = sorted(local(file).glob("*.txt"), key=lambda f: natural(f.name))
            rows = [{"prompt": f.read_text("utf-8-sig"), "name": f.stem} for f in files]
        elif kind in (".txt", ".jsonl", ".json", ".csv", ".tsv"):
            rows, key = read_rows(local(file).read_text("utf-8-sig"), kind, key)
        else:
            raise SystemExit(f"{path}: wanted .txt, .jsonl, .json, .csv, .tsv, or a folder of .txt")
    except (OSError, ValueError, csv.Error) as error:
        raise SystemExit(f"{path}: cannot be read ({error})") from None

    # each row's prompt by its key
    examples = []
    for row in rows:
        row = {"prompt": row} if isinstance(row, str) else row
        names = {str(name).lower(): name for name in row} if isinstance(row, dict) else {}
        name = key or next((names[k] for k in KEYS if k in names), None)
        if not names or not isinstance(row.get(name), str):
            has = ", ".join(map(str, names.values())) or repr(row)
            raise SystemExit(f"{path}: number {len(examples) + 1} has no prompt, but {has[:99]}; "
                             f"name one: {file}:KEY")
        examples.append({**row, "prompt": row[name].strip()})
    return [e for e in examples if e["prompt"]] or sys.exit(f"{path}: there is no prompt in it")


def read_rows(text, kind, key):
    """Return the rows of a file's text, and the key of their prompts, if it is still to be used."""
    lines = [line for line in text.split("\n") if line.strip()]
    if kind in (".csv", ".tsv"):
        header = lines[0] if lines else ""
        mark = "\t" if kind == ".tsv" else ";" if header.count(";") > header.count(",") else ","
        try:
            return list(csv.DictReader(io.StringIO(text), delimiter=mark,
                                       strict=kind == ".tsv")), key
        except csv.Error:       # a .tsv whose quotes are text, as PartiPrompts'
            return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=3)), key
    if kind != ".json":
        return lines if kind == ".txt" else [json.loads(line) for line in lines], key
    return rows_of_json(json.loads(text), key)


def rows_of_json(content, key):
    """Return the rows that a .json holds: a list; {KEY: list}; {id: object}; {name: caption}."""
    if not isinstance(content, dict):
        return content if isinstance(content, list) else [content], key
    if isinstance(content.get(key), list | dict):
        return rows_of_json(content[key], "")
    inner = next((content[k] for k in KEYS if isinstance(content.get(k), list)), None)
    if inner is not None:
        return inner, key
    if all(isinstance(x, dict) for x in content.values()):
        return list(content.values()), key
    if all(isinstance(x, str) for x in content.values()) and not {*content} & {key, *KEYS}:
        return [{"prompt": text, "name": name} for name, text in content.items()], key
    return [content], key
