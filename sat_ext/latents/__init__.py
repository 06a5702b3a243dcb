"""What encoders once gave, kept on disk: latents and text embeddings in safetensors."""
