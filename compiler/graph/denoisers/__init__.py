"""What each class of denoiser takes as inputs, and how it is called."""
