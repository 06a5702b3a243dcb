"""CogVideoX weights from SAT's layout to diffusers' and back, bit for bit."""
