"""Fixtures in the hub's formats, small enough to be made in seconds: a random SD1.5-family pipeline, pairs,
prompts.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hub_stub import Hub, point_to, serving
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from invdpo.config import StudyConfig

os.environ.pop("MLFLOW_TRACKING_URI", None)  # training would log to the server of whoever runs the tests

CAPTIONS = ["a red circle", "a blue square left of a red circle", "a green triangle", "two small circles"]


class Brightness:
    """A scorer whose values can be checked by hand; it has no answer for short prompts."""

    version = "brightness:0:none"

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        light = np.array([np.asarray(image).mean() for image in images], dtype=np.float32)
        words = np.array([len(prompt.split()) for prompt in prompts])
        return {"light": light, "long_only": np.where(words > 3, light, np.nan).astype(np.float32)}


def build_tiny_base(folder: Path, seed: int = 0) -> Path:
    """A `StableDiffusionPipeline` folder with random weights: 32x32 images, 4x4x4 latents, 16 tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        sample_size=32,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(pieces),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    reloaded = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert len(set(reloaded("a red circle").input_ids)) > 5, "the saved tokenizer lost its vocabulary"
    return folder


def build_tiny_sdxl(folder: Path, tiny_base: Path, zero_empty: bool = True, seed: int = 1) -> Path:
    """A `StableDiffusionXLPipeline` folder with random weights around the codec, scheduler and first tokenizer of the
    tiny base; its second tokenizer pads with another token, as SDXL's does.
    """
    import torch
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    base: Any = DiffusionPipeline.from_pretrained(tiny_base)
    config = base.text_encoder.config.to_dict() | {"num_hidden_layers": 3}
    wider = CLIPTextConfig(**config | {"hidden_size": 24, "projection_dim": 12, "hidden_act": "gelu"})
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),  # pyright: ignore[reportArgumentType]
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**config)),
        text_encoder_2=CLIPTextModelWithProjection(wider),
        tokenizer=base.tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(tiny_base / "tokenizer", pad_token="z"),
        unet=unet,
        scheduler=base.scheduler,
        force_zeros_for_empty_prompt=zero_empty,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def random_jpeg(generator: np.random.Generator, size: int = 40) -> bytes:
    """A smooth random picture as JPEG bytes."""
    coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def tiny_pairs_frame(rows: int = 12, ties: int = 2, seed: int = 0) -> pd.DataFrame:
    """Pairs in Pick-a-Pic v2's columns; the last `ties` rows are ties and every third winner is image 1."""
    generator = np.random.default_rng(seed)
    label_0 = [0.5 if row >= rows - ties else float(row % 3 != 2) for row in range(rows)]
    return pd.DataFrame(
        {
            "are_different": [label != 0.5 for label in label_0],
            "best_image_uid": [f"{row}-{0 if label_0[row] == 1 else 1}" for row in range(rows)],
            "caption": [CAPTIONS[row % len(CAPTIONS)] for row in range(rows)],
            "has_label": [True] * rows,
            "image_0_uid": [f"{row}-0" for row in range(rows)],
            "image_1_uid": [f"{row}-1" for row in range(rows)],
            "jpg_0": [random_jpeg(generator) for _ in range(rows)],
            "jpg_1": [random_jpeg(generator) for _ in range(rows)],
            "label_0": label_0,
            "label_1": [1 - label for label in label_0],
            "model_0": ["tiny"] * rows,
            "model_1": ["tiny"] * rows,
            "ranking_id": list(range(rows)),
            "user_id": [row % 4 for row in range(rows)],
        }
    )


@pytest.fixture(autouse=True)
def fresh_messages() -> None:
    """Every test finds the package's messages as a new process does: the command line arranges them for all of one."""
    log = logging.getLogger("invdpo")
    for handler in log.handlers:
        handler.close()
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of the SD1.5 family with random weights."""
    return build_tiny_base(tmp_path_factory.mktemp("base") / "pipeline")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A pipeline folder of the SDXL family with random weights, 32x32 images as the tiny base's."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "pipeline", tiny_base)


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Pick-a-Pic v2 parquet with 12 pairs of 40x40 images, 2 of them ties."""
    path = tmp_path_factory.mktemp("pairs") / "train.parquet"
    tiny_pairs_frame().to_parquet(path)
    return path


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone of Pick-a-Pic v2: 60 training shards of 200 rows of small JPEGs, 23 of them ties, one of
    another split.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("clone") / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    jpegs = pa.array([random_jpeg(generator, size) for size in range(32, 64)])
    table = pa.Table.from_pandas(tiny_pairs_frame(rows=200, ties=23), preserve_index=False)
    for shard in range(60):
        rows = table.take(pa.array(generator.permutation(200)))
        captions = pa.array([f"{CAPTIONS[row % 4]} of shard {shard}" for row in range(200)])
        rows = rows.set_column(rows.schema.get_field_index("caption"), "caption", captions)
        for name in ("jpg_0", "jpg_1"):
            images = jpegs.take(pa.array(generator.integers(0, len(jpegs), 200)))
            rows = rows.set_column(rows.schema.get_field_index(name), name, images)
        pq.write_table(rows, folder / f"train-{shard:05d}-of-00060-0123456789abcdef.parquet", row_group_size=50)
    pq.write_table(table.slice(0, 5), folder / "validation-00000-of-00001-0123456789abcdef.parquet")
    return folder.parent


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine, empty, that huggingface_hub takes for the real one, with a cache of the test's own."""
    from huggingface_hub import HfFileSystem, constants

    with serving(Hub({})) as served:
        point_to(served.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        HfFileSystem.clear_instance_cache()
        yield served
    HfFileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file with four prompts, one a line."""
    path = tmp_path_factory.mktemp("prompts") / "test.txt"
    path.write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny_study(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
    tiny_pairs: Path,
    tiny_prompts: Path,
) -> Callable[..., StudyConfig]:
    """Makes studies on the tiny base, in a working directory of the test's own.

    Keyword arguments replace top-level keys; `training` and `arms` are merged into the defaults.
    """
    monkeypatch.chdir(tmp_path)

    def make(training: dict[str, Any] | None = None, arms: dict[str, Any] | None = None, **changes: Any) -> StudyConfig:
        from invdpo.config import parse_study

        study: dict[str, Any] = {
            "study": "tiny",
            "base": str(tiny_base),
            "preferences": str(tiny_pairs),
            "prompts": str(tiny_prompts),
            "scorers": {},
            "device": "cpu",
            "precision": "fp32",
            "seeds": [0, 1],
            "training": {
                "steps": 4,
                "batch": 4,
                "checkpoints": [2],
                "learning_rate": 1.0e-3,
                "resolution": 32,
            }
            | (training or {}),
            "sampling": {"steps": 2, "guidance_scale": 3.0, "batch": 2},
            "arms": {"base": {"method": "no_training"}, "dpo": {"method": "diffusion_dpo"}} | (arms or {}),
        }
        return parse_study(study | changes, "tiny")

    return make


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_pairs: Path) -> Path:
    """The folder `preferences/` that `invdpo prepare` makes of the tiny pairs."""
    import torch

    from invdpo.config import parse_study
    from invdpo.preferences.cache import prepare

    folder = tmp_path_factory.mktemp("prepared")
    study = {
        "study": "tiny",
        "base": str(tiny_base),
        "preferences": str(tiny_pairs),
        "prompts": "none.txt",
        "scorers": {},
        "seeds": [0],
        "training": {"resolution": 32},
        "sampling": {},
        "arms": {"base": {"method": "no_training"}},
    }
    before = Path.cwd()
    os.chdir(folder)
    try:
        prepare(parse_study(study, "tiny"), torch.device("cpu"))
    finally:
        os.chdir(before)
    return folder / "results" / "tiny" / "preferences"


@pytest.fixture
def prepared(tiny_study: Callable[..., StudyConfig], tiny_cache: Path) -> Callable[..., StudyConfig]:
    """As `tiny_study`, the pairs already encoded."""

    def make(**changes: Any) -> StudyConfig:
        study = tiny_study(**changes)
        shutil.copytree(tiny_cache, study.root / "preferences", dirs_exist_ok=True)
        return study

    return make


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; skips the test where it is not installed."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    arguments = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs, to be copied: making one takes seconds."""
    from invdpo.tracking.store import connect

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="module")
def mlflow_server() -> Iterator[Callable[[Path], str]]:
    """Starts MLflow's server on a database file and returns its address; one takes about 20 s to answer."""
    running: list[subprocess.Popen[bytes]] = []

    def start(path: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {
            "--backend-store-uri": f"sqlite:///{path}",
            "--artifacts-destination": str(path.parent / "uploaded"),
            "--port": str(port),
            "--workers": "1",
        }
        command = [sys.executable, "-m", "mlflow", "server", *(part for pair in options.items() for part in pair)]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        with (path.parent / "server.log").open("wb") as log:
            server = subprocess.Popen(
                command, cwd=path.parent, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        running.append(server)
        url, last = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while time.monotonic() < last and server.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    return url
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"the server did not start:\n{(path.parent / 'server.log').read_text()[-3000:]}")

    yield start
    for server in running:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
