{
  description = "In the place of nixpkgs, for tests: see ../README.md";

  outputs = _: {
    lib = import ./lib.nix // {
      nixosSystem = import ./nixos.nix;
    };
    legacyPackages.x86_64-linux = import ./pkgs.nix;
  };
}
