"""A layout run on fake ranks and fake tensors: what every stage holds, says and keeps."""
