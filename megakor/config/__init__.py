"""One resolved configuration: types (`schema`), rules (`checks`), verbs and composition (`verbs`, `compose`)."""
