"""Drop-in replacements for other meta-learning libraries: change the import line of a script.

learn2learn     MAML, MetaSGD, clone_module, update_module, detach_module
higher          innerloop_ctx, monkeypatch, differentiable SGD, Adam and RMSprop
"""
