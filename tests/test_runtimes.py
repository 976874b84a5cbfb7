"""Exported files in OpenVINO and in onnxruntime-web (WebAssembly, in Node.js): outputs equal those of torch."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import export

ROOT = Path(__file__).parents[1]
# argv: file, folder with inputs.json; an input with its dims in, outputs with their dims out
SCRIPT = """
import fs from 'node:fs';
import * as ort from '%s';
ort.env.wasm.numThreads = 1;
const [file, folder] = process.argv.slice(2);
const session = await ort.InferenceSession.create(file, {executionProviders: ['wasm']});
const results = [];
for (const {dims, data} of JSON.parse(fs.readFileSync(`${folder}/inputs.json`))) {
    const outputs = await session.run({image: new ort.Tensor('float32', Float32Array.from(data), dims)});
    results.push(Object.fromEntries(Object.entries(outputs).map(([k, v]) => [k, {dims: v.dims, data: [...v.data]}])));
}
fs.writeFileSync(`${folder}/outputs.json`, JSON.stringify(results));
"""


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in ((1, 3, 32, 32), (3, 3, 32, 32), (2, 3, 48, 24))]


def compute_expected(network, x):
    """Outputs of the model in torch."""
    with torch.no_grad():
        maps = network.get_last_selfattention(x)[:, :, 0, 1:].unflatten(2, [side // 8 for side in x.shape[2:]])
        return {"features": network(x), "attention": maps,
                "patch_tokens": network.get_intermediate_layers(x)[0][:, 1:]}


@pytest.fixture(params=[["--dynamic", "size"], ["--opset", "20"], ["--precision", "int8", "--data_path", "shapes"]],
                ids=["any size", "opset 20", "int8"])
def exported(request, model, images, small_shapes):
    """An exported file, its inputs, the outputs of torch, and the largest difference allowed."""
    network, path = model
    export.main(export.parse_args(["--ckpt", str(path), "--patch_tokens", *request.param]))
    images = [x for x in images if "size" in request.param or x.shape[2:] == (32, 32)]
    return (path.with_suffix(".onnx"), images, [compute_expected(network, x) for x in images],
            0.2 if "int8" in request.param else 1e-4)


def check_outputs(outputs, expected, atol):
    assert outputs.keys() == expected.keys()
    for name, value in outputs.items():
        torch.testing.assert_close(torch.from_numpy(value), expected[name], rtol=0, atol=atol)
        cosine = torch.cosine_similarity(torch.from_numpy(value).flatten(1), expected[name].flatten(1)).min()
        assert cosine > (0.99 if atol > 0.01 else 0.99999)


def test_openvino_equals_torch(exported):
    openvino = pytest.importorskip("openvino")
    file, images, expected, atol = exported
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for x, outputs in zip(images, expected):
        result = compiled({"image": x.numpy()})
        check_outputs({name: result[name] for name in outputs}, outputs, atol)


@pytest.mark.slow
def test_onnxruntime_web_equals_torch(exported, tmp_path):
    runtime = ROOT / "node_modules" / "onnxruntime-web" / "dist" / "ort.node.min.mjs"
    if not (runtime.exists() and shutil.which("node")):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "Node.js or node_modules/onnxruntime-web is missing (npm install --no-save onnxruntime-web)")
    file, images, expected, atol = exported
    (tmp_path / "run.mjs").write_text(SCRIPT % runtime.as_uri(), encoding="utf-8")
    inputs = [dict(dims=x.shape, data=x.flatten().tolist()) for x in images]
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    subprocess.run(["node", tmp_path / "run.mjs", file, tmp_path], check=True, timeout=120)
    results = json.loads((tmp_path / "outputs.json").read_text())
    assert len(results) == len(expected)
    for result, outputs in zip(results, expected):
        arrays = {name: np.array(value["data"], "float32").reshape(value["dims"]) for name, value in result.items()}
        check_outputs(arrays, outputs, atol)
