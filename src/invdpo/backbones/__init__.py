"""Pretrained pipelines as the study sees them: an eps-model, a text conditioner, an image codec, a noise schedule.

A pipeline is a diffusers folder or a hub id. Stable Diffusion 1.x has one text encoder; SDXL has two, a pooled
embedding and size conditioning. Which of them a pipeline is, it says itself (model_index.json and unet/config.json):
nothing outside this package asks. `pipeline` loads networks and schedule, `text` encodes prompts, `files` finds and
checks what both read.
"""
