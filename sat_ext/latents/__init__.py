"""The cache: latents and text embeddings on disk, so that training loads no first stage and no text encoder."""
