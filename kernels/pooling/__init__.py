"""Maximum and average pooling over windows of images, also adaptive and global."""
