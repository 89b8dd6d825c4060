"""Stand-ins for other meta-learning libraries: scripts run after their import line is changed.

learn2learn     MAML, MetaSGD, clone_module, update_module, detach_module
higher          innerloop_ctx, monkeypatch, differentiable SGD, Adam and RMSprop
"""
