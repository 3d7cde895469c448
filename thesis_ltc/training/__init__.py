"Losses, checkpoints, the training loop, frozen trunks, and many seeds in one step."
