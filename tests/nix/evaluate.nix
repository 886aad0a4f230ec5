# What a rendered machine sets, as values: no packages are built, and what the stand-ins themselves
# set is left out.
{ machine }:
let
  sops = ((import ./sops-nix/flake.nix).outputs { }).nixosModules.sops;
  inherit
    (import ./nixpkgs/nixos.nix {
      modules = [
        sops
        machine
      ];
    })
    config
    ;
in
config
// {
  system = removeAttrs config.system [
    "boot"
    "build"
  ];
  sops = removeAttrs config.sops [ "package" ];
}
