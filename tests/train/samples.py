"""Samples and datasets in LLaVA's format."""

import json

from laco_kernels.train.data import ConversationDataset
from laco_kernels.train.mixture import read_data

TOKENS = 4


def sample(name="a.png", question="<image>\nWhat is it?", answer="A red square.", **others):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({"image": name} if name else {}) | others


def dataset(folder, samples, processor, **options):
    (folder / "data.json").write_text(json.dumps(samples))
    return ConversationDataset(read_data(folder / "data.json"), processor, **options)
