"""What models of several folders share.

transformer  the plain vision transformer in parts
fusion       BatchNorm folded into the convolution before it
"""
