"""Pretrained pipelines as the study sees them: an eps-model, a text conditioner, an image codec, a noise
schedule.

One module a family; `sd15` covers every pipeline of the Stable Diffusion 1.x/2.x epsilon-prediction layout.
"""
