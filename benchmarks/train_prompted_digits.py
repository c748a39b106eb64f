"""Train the conditional reference model `prompted-digits`, and write it with its classifier and its card.

    python benchmarks/train_prompted_digits.py --work /tmp/prompted            # train (resumes), evaluate, write
    python benchmarks/train_prompted_digits.py --work /tmp/prompted --steps 0  # evaluate and write the checkpoint

The model is a whole `StableDiffusionPipeline`. Each part is trained from scratch on pictures that `captioned_digits.py`
draws: first the autoencoder, then the denoiser together with the text encoder. Every step draws its random numbers from
(seed, step), so an interrupted run resumes without changing the result.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from captioned_digits import DIGITS, GROUNDS, PENS, PICTURES, SLANTS, Pictures, Ruler, draw, new_ruler
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fit_classifier import accuracy, fit_classifier
from handwritten_digits import divided, scans
from image_classifier import ImageClassifier
from model_card import machine, write_card
from prompt_following import STEPS, Request, followed, full_requests, left_open, sample, save_gallery
from safetensors.torch import load_file, save_file
from small_tokenizer import write_tokenizer
from torch import Tensor, nn
from torch.nn import functional
from training import Training, annealed
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

Figures = dict[str, object]

MODEL = Path(__file__).parents[1] / "src/unetc/models/prompted-digits"
WORDS = (*DIGITS, *SLANTS, *PENS, *GROUNDS, "a", "an", "and", "on", "ground", ",")
TEXT_LENGTH = 16
TEXT_WIDTH = 64
BATCH = 32
CLASSIFIER_PICTURES = 12_000
CLASSIFIER_EPOCHS = 8
UNSEEN_PICTURES = 2_000
UNSEEN = 1_000_000
"""Added to the seed for unseen pictures; no training step and no training picture uses the sum as its seed."""
AUTOENCODER_STEPS = 900
AUTOENCODER_RATE = 2e-3
KL_WEIGHT = 1e-6
RATE = 1e-3
DROPPED_CAPTIONS = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""
DENOISER = "denoiser.pt"
"""File name of the denoiser's checkpoint."""
TEXT_STEPS = 400
TEXT_BATCH = 256
CLEAREST = 5.0
NOISIEST = 0.05
"""Signal-to-noise ratios beyond which the weight of a step in the loss no longer changes."""
GUIDANCE = 3.0
OTHER_GUIDANCES = (1.0, 5.0, 7.5)
SAMPLES_PER_REQUEST = 8
TEXT = """# prompted-digits: the conditional reference model of unetc

A Stable Diffusion in miniature: a whole diffusers `StableDiffusionPipeline` (tokenizer, text encoder, autoencoder,
denoiser with cross-attention) of a few megabytes, trained from scratch, that draws 32x32 pictures of handwritten digits
according to its prompt. It stands in for the real one in tests and on laptops, where the real one is too large. Stock
tools run on it unchanged. It is not meant to generate digits for any other use.

![Two samples of each digit with their prompts](samples.png)

A prompt names the digit ("zero" to "nine") and may say "upright" or "slanted", "thin" or "thick", "on a dark ground" or
"on a light ground", in the orders shown above. Other words have tokens, but did not occur in training.

Data: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
doi:10.24432/C50P49, CC BY 4.0; `benchmarks/captioned_digits.py` draws the pictures and their captions. The digit
is judged by the included classifier, which was trained on pictures of four fifths of the scans (the denoiser saw all of
them). Slant, pen and ground are measured on the pixels, against thresholds calibrated on drawn pictures; the table
shows how often this reads a drawn picture correctly. Attributes left open: the share of samples that are slanted, thick
and light when the prompt names only the digit; half of the drawn pictures are."""


def new_autoencoder() -> AutoencoderKL:
    """Build the untrained autoencoder: 3x32x32 to 4x16x16."""
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(16, 24),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def new_denoiser() -> UNet2DConditionModel:
    """Build the untrained denoiser: three resolutions, cross-attention at the two lower ones."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_scheduler() -> DDIMScheduler:
    """Build the noise schedule of Stable Diffusion."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_autoencoder(work: Path, pictures: Pictures, seed: int) -> tuple[AutoencoderKL, Training]:
    """Train the autoencoder, resuming from `work`, and return the averaged (EMA) model."""
    torch.manual_seed(seed)
    autoencoder = new_autoencoder().train()
    training = Training(autoencoder, AUTOENCODER_RATE, work / "autoencoder.pt")
    for step, generator in training.steps(AUTOENCODER_STEPS, seed):
        images = in_colour(pictures.images[torch.randint(0, PICTURES, (BATCH,), generator=generator)])
        posterior = autoencoder.encode(images).latent_dist
        rebuilt = autoencoder.decode(posterior.sample(generator)).sample
        loss = functional.mse_loss(rebuilt, images) + 0.1 * functional.l1_loss(rebuilt, images)
        training.descend(loss + KL_WEIGHT * posterior.kl().mean(), annealed(step, AUTOENCODER_STEPS))
    training.finish()
    return autoencoder, training


def in_colour(images: Tensor) -> Tensor:
    """Repeat grey images [count, 1, 32, 32] to [count, 3, 32, 32], the format that stock pipelines decode to."""
    return images.expand(-1, 3, -1, -1)


def encoded_once(autoencoder: AutoencoderKL, images: Tensor, path: Path) -> Tensor:
    """Encode images, or load their latents from the file if it exists."""
    if not path.exists():
        save_file({"latents": encoded(autoencoder, images)}, path)
    return load_file(path)["latents"]


@torch.no_grad()
def encoded(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images [count, 1, 32, 32] to latents [count, 4, 16, 16]."""
    modes = [autoencoder.encode(in_colour(batch)).latent_dist.mode() for batch in torch.split(images, 250)]
    return torch.cat(modes).contiguous()


def teach_text_encoder(text_encoder: CLIPTextModel, tokens: Tensor, pictures: Pictures, seed: int) -> float:
    """Train the text encoder to predict a picture's attributes from its caption; return its accuracy on the digit.

    Joint training alone was slow to learn the digit, which is one word of many and hardly affects the loss. Predictions
    are read from the first end token and all later ones, which attend to the whole caption.
    """
    truths = torch.stack((pictures.digits, pictures.slants, pictures.pens, pictures.grounds), dim=1)
    heads = nn.Linear(TEXT_WIDTH, len(DIGITS) + 2 + 2 + 2)
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *heads.parameters()], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(TEXT_STEPS):
        chosen = torch.randint(0, len(tokens), (TEXT_BATCH,), generator=generator)
        ended = tokens[chosen] == text_encoder.config.eos_token_id
        logits = heads(text_encoder(tokens[chosen]).last_hidden_state[ended]).split((len(DIGITS), 2, 2, 2), dim=1)
        truth = truths[chosen].unsqueeze(1).expand(-1, TEXT_LENGTH, -1)[ended]
        losses = (functional.cross_entropy(logit, truth[:, place]) for place, logit in enumerate(logits))
        loss = sum(losses, start=torch.zeros(()))
        for group in optimizer.param_groups:
            group["lr"] = RATE * annealed(step, TEXT_STEPS)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    named = float((logits[0].argmax(1) == truth[:, 0]).float().mean())
    print(f"text encoder: loss {loss.item():.3f}, digit named {named:.3f}", flush=True)
    return named


def weights(scheduler: DDIMScheduler, timesteps: Tensor) -> Tensor:
    """Compute each timestep's weight in the loss of epsilon, `[count]`: the weight of v, clamped at both ends.

    Without weights, nearly clean latents dominate the loss, and the steps that decide the digit hardly count.

    Source:
        Hang et al. 2023, arXiv:2303.09556, eq. (9) for v. Differs: stated for epsilon, and also bounded for pure noise.
    """
    kept: Tensor = scheduler.alphas_cumprod[timesteps]
    ratio = kept / (1 - kept)
    return (ratio + 1).clamp(max=CLEAREST) / ratio.clamp(min=NOISIEST)


def train_denoiser(
    work: Path, steps: int, seed: int, data: tuple[Tensor, Tensor, Tensor], modules: nn.ModuleDict
) -> Training:
    """Train denoiser and text encoder together up to `steps` optimiser steps, resuming from `work`.

    Args:
        work: Folder of the checkpoint.
        steps: Total optimiser steps.
        seed: Seed of the order of pictures, the noise and the dropped captions.
        data: Latents `[count, 4, 16, 16]` with a standard deviation of one, the tokens of their captions
            `[count, 16]`, and the tokens of the empty caption `[16]`.
        modules: `denoiser` and `text_encoder`, trained in place.
    """
    latents, tokens, empty = data
    scheduler = new_scheduler()
    training = Training(modules.train(), RATE, work / DENOISER)
    for step, generator in training.steps(steps, seed):
        chosen = torch.randint(0, len(latents), (BATCH,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, 1, generator=generator) < DROPPED_CAPTIONS
        text = modules["text_encoder"](torch.where(dropped, empty, tokens[chosen])).last_hidden_state
        noisy = scheduler.add_noise(latents[chosen], noise, timesteps)
        predicted = modules["denoiser"](noisy, timesteps, encoder_hidden_states=text).sample
        errors = (predicted - noise).square().mean(dim=(1, 2, 3))
        training.descend((weights(scheduler, timesteps) * errors).mean(), annealed(step, steps))
    training.finish()
    return training


def tokens_of(tokenizer: CLIPTokenizer, captions: tuple[str, ...]) -> Tensor:
    """Tokenise captions into `[count, 16]`, as the pipeline does."""
    padded = tokenizer(list(captions), padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    tokens: Tensor = padded.input_ids
    return tokens


def train_classifier(work: Path, seed: int) -> tuple[ImageClassifier, float]:
    """Train the classifier on pictures of 4/5 of the scans; return it with its accuracy on pictures of the rest."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    train, held_out = divided(len(scans()[1]), generator)
    if not (path := work / "classifier.safetensors").exists():
        pictures = draw(CLASSIFIER_PICTURES, seed, train)
        fitted = fit_classifier(pictures.images, pictures.digits, generator, epochs=CLASSIFIER_EPOCHS)
        save_file(fitted.state_dict(), path)
    classifier = ImageClassifier.load(path)
    unseen = draw(UNSEEN_PICTURES, seed + UNSEEN, held_out)
    return classifier, accuracy(classifier, unseen.images, unseen.digits)


def reconstruction_db(autoencoder: AutoencoderKL, pictures: Pictures) -> float:
    """Measure the PSNR of decoded latents, in dB."""
    decoded = autoencoder.decode(encoded(autoencoder, pictures.images)).sample
    return 10 * float(np.log10(4 / functional.mse_loss(decoded, in_colour(pictures.images)).item()))


def ruler_accuracy(ruler: Ruler, pictures: Pictures) -> dict[str, float]:
    """Compute the share of drawn pictures whose attributes the ruler reads correctly."""
    drawn = {"slant": pictures.slants, "pen": pictures.pens, "ground": pictures.grounds}
    seen = ruler.read(pictures.images, pictures.digits)
    return {name: round(float((seen[name] == drawn[name]).float().mean()), 3) for name in drawn}


def evaluate(pipeline: StableDiffusionPipeline, classifier: ImageClassifier, pictures: Pictures, seed: int) -> Figures:
    """Evaluate samples of the pipeline, at the guidance of the card and at others."""
    ruler, unseen = new_ruler(pictures), draw(UNSEEN_PICTURES, seed + UNSEEN)
    requests = full_requests()
    prompts = [request.prompt for request in requests]
    many = requests * SAMPLES_PER_REQUEST
    images = sample(pipeline, prompts * SAMPLES_PER_REQUEST, GUIDANCE, seed)
    others = {}
    for guidance in OTHER_GUIDANCES:
        print(f"sampling with guidance {guidance}", flush=True)
        drawn = sample(pipeline, prompts, guidance, seed + 1)
        others[str(guidance)] = {"samples": len(prompts), **followed(requests, drawn, classifier, ruler)}
    digits = torch.arange(len(DIGITS)).repeat(SAMPLES_PER_REQUEST)
    open_images = sample(pipeline, [Request(digit=digit).prompt for digit in digits.tolist()], GUIDANCE, seed + 2)
    return {
        "samples": len(many),
        "sampler": f"DDIM, {STEPS} steps, guidance {GUIDANCE}",
        "prompts": len(set(prompts)),
        "prompt_followed": followed(many, images, classifier, ruler),
        "prompt_followed_by_guidance": others,
        "attributes_left_open": left_open(open_images, digits, ruler),
        "drawn_pictures_read_right": ruler_accuracy(ruler, unseen),
        "autoencoder_psnr_db": round(reconstruction_db(pipeline.vae, unseen), 1),
    }


def save_model(pipeline: StableDiffusionPipeline, classifier: ImageClassifier, folder: Path) -> None:
    """Write the pipeline folder with the classifier, and the tokenizer in a format that every release reads."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(WORDS, TEXT_LENGTH, folder / "tokenizer")
    (folder / "classifier").mkdir(exist_ok=True)
    save_file(classifier.state_dict(), folder / "classifier/model.safetensors")


def show(pipeline: StableDiffusionPipeline, seed: int, path: Path) -> None:
    """Save a gallery with two samples of each digit, in all forms of prompts."""
    chosen = [
        Request(
            digit=place % 10, slant=place // 10 ^ place % 2, pen=place // 2 % 2, ground=place // 3 % 2, form=place % 4
        )
        for place in range(2 * len(DIGITS))
    ]
    prompts = [request.prompt for request in chosen]
    save_gallery(sample(pipeline, prompts, GUIDANCE, seed), prompts, path)


def main() -> None:
    """Train, evaluate and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--steps", type=int, default=3600, help="total optimiser steps of the denoiser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL, help="model folder to write")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    pictures = draw(PICTURES, options.seed)
    autoencoder, first = train_autoencoder(options.work, pictures, options.seed)
    tokenizer = write_tokenizer(WORDS, TEXT_LENGTH, options.work / "tokenizer")
    torch.manual_seed(options.seed)
    modules = nn.ModuleDict({"denoiser": new_denoiser(), "text_encoder": new_text_encoder(tokenizer)})
    tokens, empty = tokens_of(tokenizer, pictures.captions), tokens_of(tokenizer, ("",))[0]
    if not (options.work / DENOISER).exists():
        teach_text_encoder(modules["text_encoder"], tokens, pictures, options.seed)
    latents = encoded_once(autoencoder, pictures.images, options.work / "latents.safetensors")
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item())
    latents = latents * autoencoder.config.scaling_factor
    second = train_denoiser(options.work, options.steps, options.seed, (latents, tokens, empty), modules)
    classifier, held_out_accuracy = train_classifier(options.work, options.seed)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=modules["text_encoder"],
        tokenizer=tokenizer,
        unet=modules["denoiser"],
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_model(pipeline, classifier, options.out)
    show(pipeline, options.seed, options.out / "samples.png")
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    figures: Figures = {
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "optimiser_steps": {"vae": first.done, "unet": second.done},
        "training_minutes": {"vae": round(first.seconds / 60, 1), "unet": round(second.seconds / 60, 1)},
        "training_machine": machine(),
        "seed": options.seed,
        "classifier_accuracy_on_pictures_of_held_out_scans": round(held_out_accuracy, 4),
        **evaluate(pipeline, classifier, pictures, options.seed + UNSEEN),
    }
    write_card(TEXT, "python benchmarks/train_prompted_digits.py --work /tmp/prompted", figures, options.out)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
