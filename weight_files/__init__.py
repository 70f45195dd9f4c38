"""Files of released weights, read without running anything in them; weights.py is what others call.

containers    torch zip, TorchScript, legacy torch, safetensors, npz, as bytes
inert_pickle  pickles read as data
places        where in an opened container the weights are
families      which released model a set of names looks like
class_rows    which outputs of a class head belong to which class
"""
