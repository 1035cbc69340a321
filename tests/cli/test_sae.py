"""`efface sae`: trains, saves, is refused what it cannot do, and shows a latent's pictures."""

SHORT = [f"--set={s}" for s in ("steps=30", "batch=256", "lr=5e-3", "expansion=4", "trajectories=4", "latent_steps=4", "pool=2")]


def test_train_and_show(efface, model_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat, sitting\n\na dog\n", encoding="utf-8")
    trained = efface("sae", "train", "--model", model_folder, "--prompts", "prompts.txt", "--out", "sae.safetensors", "--json", *SHORT)
    assert trained.code == 0, trained.err
    assert trained.json["unexplained"] < 0.5
    assert trained.json["info"]["prompts"] == 2
    assert [p.name for p in tmp_path.iterdir() if "checkpoint" in p.name] == []
    erased = efface(
        "erase", "cat", "--method", "saeuron(preset='check')", "--asset", "sae=sae.safetensors", "--model", model_folder, "--images", "none"
    )
    assert erased.code == 0, erased.err
    shown = efface(
        "sae", "show", "runs/no-cat", "--model", model_folder, "--prompts", "prompts.txt", "--count", 2, "--out", "p.html", "--json"
    )
    assert shown.code == 0, shown.err
    assert shown.json["pictures"] == 3
    assert "data:image" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_a_method_without_its_asset_says_how_to_make_one(efface, model_folder):
    method = ("erase", "cat", "--method", "saeuron", "--model", model_folder, "--images", "none")
    outcome = efface(*method)
    assert outcome.code == 2
    assert "needs the asset 'sae'" in outcome.err
    assert "efface sae train" in outcome.err
    assert "write sae=FILE" in efface(*method, "--asset", "vae=x").err


def test_refusals(efface, model_folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "there.safetensors").write_bytes(b"x")
    train = ("sae", "train", "--model", model_folder)
    for arguments, message in (
        (("--out", "a.pt"), "ends in .safetensors"),
        (("--out", "there.safetensors"), "is there already"),
        (("--prompts", "empty.txt"), "holds no prompt"),
        (("--prompts", "absent.txt"), "cannot read the prompts absent.txt"),
        (("--set", "stepps=3"), "no field 'stepps'; did you mean 'steps'?"),
        (("--set", "steps"), "write --set field=value"),
    ):
        outcome = efface(*train, *arguments)
        assert outcome.code == 2
        assert message in outcome.err
